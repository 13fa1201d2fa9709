"""The ruler: seconds per stage on whatever device there is, and diffusers on the same weights and shapes beside it.

    python -m cosmos3_core.bench --random-weights nano --num-frames 189 --height 720 --width 1280

``subject`` says what is measured, ``ours`` and ``theirs`` measure it, ``report`` prints it.
"""
