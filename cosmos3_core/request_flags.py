"""The flags of a generation and the request they make, shared by every command that takes a prompt. No torch here."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmos3_core.request import GenerationRequest

_SCHEDULES = {"auto": "shipped", "true": "karras", "false": "native"}


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """Add what a user asks for, and ``--out``."""
    add = parser.add_argument
    add("--prompt", default="", help="plain text, or a JSON object; dynamics can do without")
    add("--mode", help="text_to_image, image_to_video, policy ...; told from the inputs where there are no actions")
    add("--image", metavar="FILE", help="to begin with")
    add("--video", metavar="FILE", help="to continue, or to find the actions of")
    add("--sound", action="store_true", help="a sound track as well")
    add("--condition-frames", type=int, nargs="+", metavar="N", help="latent frames that --video fixes; 0 1")
    add("--condition-keep", choices=("first", "last"), help="frames of a longer --video")
    add("--actions", metavar="FILE", help="JSON, rows of numbers: what forward dynamics carries out")
    add("--action-chunk-size", type=int, help="actions; 16, or as many as --actions holds")
    add("--domain-name", help="embodiment of the actions: bridge_orig_lerobot, av ...")
    add("--domain-id", type=int, help="embodiment by number")
    add("--raw-action-dim", type=int, help="numbers in an action; the embodiment's")
    add("--resolution-tier", type=int, help="with actions: 256, 480, 704 or 720")
    add("--view-point", help="with actions: ego_view, third_person_view, wrist_view or concat_view")
    add("--negative-prompt", help="omit for the structured default; '' for none")
    add("--num-frames", type=int, help="189 for video; 1 makes a png; rounded up to 1 + 4k")
    add("--height", type=int, help="720 on Nano and Super; a multiple of 16")
    add("--width", type=int, help="1280 on Nano and Super; a multiple of 16")
    add("--steps", type=int, help="denoising steps, 35 for video")
    add("--guidance-scale", type=float, help="6.0 for video on Nano and Super; 1 turns guidance off")
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="timesteps that guidance is for")
    add("--flow-shift", type=float, help="10.0 for video on Nano and Super")
    add(
        "--use-karras-sigmas",
        choices=tuple(_SCHEDULES),
        help="noise schedule: false = native (default), true = karras, auto = what the checkpoint ships",
    )
    add("--fps", type=float, help="24")
    add("--seed", type=int, default=42)
    add("--compat", choices=("native", "diffusers"), default="native", help="whose prompts and schedule to follow")
    add("--output", help="mp4, wav (with --sound), png, jpeg or webp (one frame), or actions alone")
    add("--output-quality", type=int, help="of jpeg and webp, 0 to 100")
    add("--crf", type=float, help="of mp4, H.264's quality, 0 (best) to 51; 18")
    add("--lossless", action="store_true", help="of mp4: its yuv420p planes are stored exactly")
    add("--out", default="cosmos3", metavar="PREFIX", help="writes PREFIX.mp4, PREFIX.png ..., PREFIX.actions.json")


def add_engine_flags(parser: argparse.ArgumentParser, *, is_checkpoint_required: bool = True) -> None:
    """Add how a process of its own does it: checkpoint, device, dtype, ranks."""
    add = parser.add_argument
    add("--checkpoint", required=is_checkpoint_required, help="checkpoint directory in the published layout")
    add("--dtype", help="of the weights: float32, bfloat16 or float16; default as stored")
    add("--device", help="torch device; default the first GPU, else the CPU")
    add("--tp", type=int, default=1, help="ranks that share heads and FFN columns; start with torchrun")
    add("--cfg", type=int, default=1, help="2 runs the guidance branches side by side; start with torchrun")
    add("--sp", type=int, default=1, help="ranks that share the generated tokens; start with torchrun")


def request_of(options: argparse.Namespace) -> GenerationRequest:
    """The request that the flags of :func:`add_request_flags` describe.

    Raises:
        RequestError: the file of actions cannot be read.
    """
    from cosmos3_core.request import GenerationRequest

    return GenerationRequest(
        prompt=options.prompt,
        mode=options.mode,
        image=options.image,
        video=options.video,
        generate_sound=options.sound,
        condition_frame_indexes_vision=options.condition_frames,
        condition_video_keep=options.condition_keep,
        actions=None if options.actions is None else _read_actions(Path(options.actions)),
        action_chunk_size=options.action_chunk_size,
        domain_name=options.domain_name,
        domain_id=options.domain_id,
        raw_action_dim=options.raw_action_dim,
        resolution_tier=options.resolution_tier,
        view_point=options.view_point,
        negative_prompt=options.negative_prompt,
        num_frames=options.num_frames,
        height=options.height,
        width=options.width,
        fps=options.fps,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        guidance_interval=options.guidance_interval,
        flow_shift=options.flow_shift,
        schedule=None if options.use_karras_sigmas is None else _SCHEDULES[options.use_karras_sigmas],
        seed=options.seed,
        output=options.output,
        output_quality=options.output_quality,
        crf=options.crf,
        lossless=options.lossless,
        compat=options.compat,
    )


def _read_actions(path: Path) -> Any:
    """Rows of numbers in a JSON file: bare, or as the ``data`` of what a generation wrote."""
    from cosmos3_core.errors import RequestError

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError("actions", str(path), "a JSON file with rows of numbers", str(error)) from None
    return content["data"] if isinstance(content, dict) and "data" in content else content
