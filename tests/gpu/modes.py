"""Every mode in one process, on the device against the CPU in fp32, and in bf16 as it is served.

What is compared in fp32 are final latents of every modality: with TF32 off, in the VAE's convolutions too, where torch
has it on, only the order of sums differs. In bf16 the run has to end and give finite numbers of the right shapes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cosmos3_core.engine import Engine
from cosmos3_core.generate import GenerationResult, generate
from cosmos3_core.media.probe import probe_video
from cosmos3_core.request import GenerationRequest
from tests.gpu.verdict import Verdict, run_check

FP32_TOLERANCE = 1e-4

_SMALL: dict[str, Any] = {"height": 80, "width": 96, "num_inference_steps": 4, "seed": 3}
_CLIP = np.random.default_rng(0).integers(0, 256, (9, 90, 120, 3), dtype=np.uint8)
_ACTING: dict[str, Any] = {"domain_name": "bridge_orig_lerobot", "num_inference_steps": 4, "action_chunk_size": 8}
_ACTIONS = np.random.default_rng(1).normal(size=(8, 10)).tolist()

REQUESTS: dict[str, dict[str, Any]] = {
    "text_to_image": {"prompt": "a car", "num_frames": 1, **_SMALL},
    "text_to_video": {"prompt": "a car", "num_frames": 9, **_SMALL},
    "image_to_video": {"prompt": "a car", "num_frames": 9, "image": _CLIP[0], **_SMALL},
    "video_to_video": {"prompt": "a car", "num_frames": 13, "video": _CLIP, **_SMALL},
    "text_to_video_with_sound": {"prompt": "a car", "num_frames": 9, "generate_sound": True, **_SMALL},
    "image_to_video_with_sound": {
        "prompt": "a car", "num_frames": 9, "generate_sound": True, "image": _CLIP[0], **_SMALL
    },
    "video_to_video_with_sound": {
        "prompt": "a car", "num_frames": 13, "generate_sound": True, "video": _CLIP, **_SMALL
    },
    "forward_dynamics": {"image": _CLIP[0], "actions": _ACTIONS, **_ACTING},
    "inverse_dynamics": {"video": _CLIP, **_ACTING},
    "policy": {"prompt": "pick it up", "image": _CLIP[0], **_ACTING},
}  # fmt: skip


def check_modes(checkpoint: Path, device: str) -> list[Verdict]:
    """A verdict for every mode that the checkpoint offers, in both dtypes."""
    verdicts = []
    with (
        Engine(checkpoint, dtype=torch.float32, device="cpu") as reference,
        Engine(checkpoint, dtype=torch.float32, device=device) as exact,
        Engine(checkpoint, dtype=torch.bfloat16, device=device) as served,
    ):
        for mode, fields in REQUESTS.items():
            request = GenerationRequest(mode=mode.removesuffix("_with_sound"), **fields)
            verdicts.append(run_check(f"{mode}, float32", lambda request=request: _compare(exact, reference, request)))
            verdicts.append(run_check(f"{mode}, bfloat16", lambda request=request: _generate(served, request)))
    return verdicts


def _compare(engine: Engine, reference: Engine, request: GenerationRequest) -> str:
    with torch.backends.cudnn.flags(allow_tf32=False):
        ours, theirs = (generate(it, request, output="latent") for it in (engine, reference))
    assert ours.latents is not None
    assert theirs.latents is not None
    differences = {
        name: float((ours.latents[name].cpu() - expected).norm() / expected.norm().clamp(min=1e-12))
        for name, expected in theirs.latents.items()
    }
    said = ", ".join(f"{name} {difference:.1e}" for name, difference in differences.items())
    if not max(differences.values()) <= FP32_TOLERANCE:  # NaN is a fault too
        raise AssertionError(f"{said} away from the CPU, allowed {FP32_TOLERANCE:.1e}")
    return f"{said} away from the CPU, allowed {FP32_TOLERANCE:.1e}"


def _generate(engine: Engine, request: GenerationRequest) -> str:
    with tempfile.TemporaryDirectory() as directory:
        result = generate(engine, request, Path(directory) / "result")
        said = [] if result.path is None else [_file(result)]
    if result.actions is not None:
        assert np.isfinite(result.actions.values).all()
        said.append(f"{result.actions.values.shape[0]} actions")
    seconds = sum(result.timings_s.get(stage, 0.0) for stage in ("condition", "denoise", "decode", "decode_sound"))
    return f"{', '.join(said)} in {seconds:.2f} s"


def _file(result: GenerationResult) -> str:
    assert result.path is not None
    if result.path.suffix != ".mp4":
        return f"{result.path.suffix[1:]} of {result.path.stat().st_size} bytes"
    info = probe_video(result.path)
    assert info.num_frames == result.request.num_frames
    assert (info.sound is not None) == (result.request.num_sound_latents > 0)
    return f"{info.num_frames} frames, {info.width}x{info.height}" + (", sound" if info.sound else "")
