"""Benchmarks: measure this project on any device, and diffusers on the same work in the same run.

    cosmos3 bench --random-weights nano --num-frames 189 --height 720 --width 1280    every stage, in seconds
    cosmos3 bench vae --random-weights nano ...     the video VAE: frames per second, first chunk, peak memory
    cosmos3 bench encode --num-frames 96 ...        the mp4 writer: frames per second, delay, peak memory, bytes

``python -m cosmos3_core.bench`` is the same without Ray. ``subject`` is the measured model, ``ours`` and ``theirs`` run
it, ``stages``, ``vae`` and ``encode`` measure time, ``peak`` measures memory, ``report`` prints.
"""
