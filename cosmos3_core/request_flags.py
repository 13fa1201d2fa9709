"""The flags of a generation and the request they make, shared by every command that takes a prompt. No torch here."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cosmos3_core.request import GenerationRequest

_SCHEDULES = {"auto": "shipped", "true": "karras", "false": "native"}


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """Add what a user asks for, and ``--out``."""
    add = parser.add_argument
    add("--prompt", required=True, help="plain text, or a JSON object")
    add("--negative-prompt", help="omit for the structured default; '' for none")
    add("--num-frames", type=int, help="189 for video; 1 makes a png; rounded up to 1 + 4k")
    add("--height", type=int, help="720 on Nano and Super; a multiple of 16")
    add("--width", type=int, help="1280 on Nano and Super; a multiple of 16")
    add("--steps", type=int, help="denoising steps, 35 for video")
    add("--guidance-scale", type=float, help="6.0 for video on Nano and Super; 1 turns guidance off")
    add("--flow-shift", type=float, help="10.0 for video on Nano and Super")
    add(
        "--use-karras-sigmas",
        choices=tuple(_SCHEDULES),
        help="noise schedule: false = native (default), true = karras, auto = what the checkpoint ships",
    )
    add("--fps", type=float, help="24")
    add("--seed", type=int, default=42)
    add("--compat", choices=("native", "diffusers"), default="native", help="whose prompts and schedule to follow")
    add("--out", default="cosmos3", metavar="PREFIX", help="writes PREFIX.mp4, or PREFIX.png for one frame")


def add_engine_flags(parser: argparse.ArgumentParser, *, is_checkpoint_required: bool = True) -> None:
    """Add how a process of its own does it: checkpoint, device, dtype, the file's quality."""
    add = parser.add_argument
    add("--checkpoint", required=is_checkpoint_required, help="checkpoint directory in the published layout")
    add("--dtype", help="of the weights: float32, bfloat16 or float16; default as stored")
    add("--device", help="torch device; default the first GPU, else the CPU")
    add("--tp", type=int, default=1, help="ranks that share heads and FFN columns; start with torchrun")
    add("--cfg", type=int, default=1, help="2 runs the guidance branches side by side; start with torchrun")
    add("--sp", type=int, default=1, help="ranks that share the generated tokens; start with torchrun")
    add("--crf", type=float, help="H.264 quality, 0 (best) to 51; default 18")


def request_of(options: argparse.Namespace) -> GenerationRequest:
    """The request that the flags of :func:`add_request_flags` describe."""
    from cosmos3_core.request import GenerationRequest

    return GenerationRequest(
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        num_frames=options.num_frames,
        height=options.height,
        width=options.width,
        fps=options.fps,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        flow_shift=options.flow_shift,
        schedule=None if options.use_karras_sigmas is None else _SCHEDULES[options.use_karras_sigmas],
        seed=options.seed,
        compat=options.compat,
    )
