"""The classes of PhyAI's documentation, so that code written for it runs: its processor, request and post-processor.

:class:`~cosmos3_core.engine.Engine` is PhyAI's engine too; :func:`run_step` is its ``step``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from cosmos3_core import checks
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.media.mp4 import Mp4Writer
from cosmos3_core.media.pixels import Frames, to_unit, unit_to_uint8
from cosmos3_core.media.sound import Samples, SoundFormat, WavWriter
from cosmos3_core.model.transformer import SOUND, VIDEO
from cosmos3_core.presets import LIMITS
from cosmos3_core.prompts import PromptFormat, PromptIds, load_tokenizer, tokenize_prompts
from cosmos3_core.request import DIFFUSERS_BEHAVIOUR, FIELDS, NATIVE_BEHAVIOUR
from cosmos3_core.resolve import find_shipped_schedule
from cosmos3_core.shapes import LatentShape, sound_samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cosmos3_core.checkpoint.layout import CheckpointLayout
    from cosmos3_core.denoiser import StepEvent
    from cosmos3_core.engine import Engine

# One latent of the sound tokenizer at 48 kHz: a waveform of whole latents ends less than that before its video.
_MAX_PADDED_SAMPLES = 1920


@dataclass(frozen=True)
class TokenizedPrompt:
    """One prompt as PhyAI's request takes it.

    Attributes:
        text_ids: (1, S) int64, with the chat template's and the closing special tokens.
        text_mask: (1, S) int64, all ones: prompts are never padded.
        text, origin: see :class:`~cosmos3_core.prompts.PromptIds`.
    """

    text_ids: Tensor
    text_mask: Tensor
    text: str
    origin: str


class Cosmos3Processor:
    """Turns prompts into token ids for clips of one shape.

    Args:
        tokenizer_dir: a checkpoint's ``text_tokenizer`` folder, or the checkpoint itself.
        fps, num_frames, height, width, append_metadata, compat, view_point: see
            :class:`~cosmos3_core.prompts.PromptFormat`.
        use_system_prompt: None: only under ``compat="diffusers"``.
        negative_metadata: None: ``same``, or ``inverse`` under ``compat="diffusers"``.
        tokenizer: an already loaded one, to share between processors.

    Raises:
        RequestError: a setting is out of bounds.
        MissingFileError, CorruptFileError: the tokenizer cannot be loaded.
    """

    def __init__(
        self,
        tokenizer_dir: str | Path,
        *,
        fps: float = 24.0,
        num_frames: int = 189,
        height: int = 720,
        width: int = 1280,
        append_metadata: bool = True,
        use_system_prompt: bool | None = None,
        negative_metadata: str | None = None,
        compat: str = NATIVE_BEHAVIOUR,
        view_point: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        # diffusers' own default; `resolve` reads the checkpoint's.
        like_diffusers = FIELDS["compat"].check("compat", compat) == DIFFUSERS_BEHAVIOUR
        metadata = ("inverse" if like_diffusers else "same") if negative_metadata is None else negative_metadata
        self.prompt_format = PromptFormat(
            num_frames=FIELDS["num_frames"].check("num_frames", num_frames),
            height=checks.integer("height", height, 1, LIMITS.max_side_pixels),
            width=checks.integer("width", width, 1, LIMITS.max_side_pixels),
            fps=FIELDS["fps"].check("fps", fps),
            append_metadata=append_metadata,
            use_system_prompt=like_diffusers if use_system_prompt is None else use_system_prompt,
            negative_metadata=FIELDS["negative_metadata"].check("negative_metadata", metadata),
            compat=compat,
            view_point=None if view_point is None else FIELDS["view_point"].check("view_point", view_point),
        )
        path = Path(tokenizer_dir)
        self.tokenizer_dir = path / "text_tokenizer" if (path / "model_index.json").exists() else path
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(self.tokenizer_dir)

    def tokenize_pair(
        self, prompt: str, negative_prompt: str | None = None, *, device: torch.device | str = "cpu"
    ) -> tuple[TokenizedPrompt, TokenizedPrompt]:
        """Return the token ids of the conditional and the unconditional branch, as tensors.

        Args:
            prompt: plain text, or a JSON object as a string.
            negative_prompt: None takes the checkpoint's own default, or ours if it has none; "" is empty.

        Raises:
            RequestError: a prompt has more tokens than the limit.
        """

        def as_tensors(prompt_ids: PromptIds) -> TokenizedPrompt:
            text_ids = torch.tensor([prompt_ids.ids], dtype=torch.int64, device=device)
            return TokenizedPrompt(text_ids, torch.ones_like(text_ids), prompt_ids.text, prompt_ids.origin)

        conditional, unconditional = tokenize_prompts(
            prompt, negative_prompt, self.prompt_format, self.tokenizer, self.tokenizer_dir
        )
        return as_tensors(conditional), as_tensors(unconditional)


@dataclass(frozen=True)
class Cosmos3T2VRequest:
    """One tokenised text-to-video request.

    Attributes:
        text_ids: (1, S) int64, from :meth:`Cosmos3Processor.tokenize_pair`; right-padding is allowed.
        text_mask: (1, S), 1 at real tokens.
        neg_text_ids, neg_text_mask: the same for the negative prompt.
        video_shape: latent (frames, rows, columns); see :func:`pixel_to_latent_shape`.
        fps: pixel frames per second.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 runs the prompt's branch alone.
        noise: initial noise (1, C, *video_shape) instead of the seed's, or a mapping modality -> noise.
        seed: seed of the initial noise.
        sound_frames: sound latents to generate with the video, see :func:`cosmos3_core.shapes.num_sound_latents`.
        flow_shift: None = the engine's.
        schedule: ``native``, ``linear`` or ``karras``; None = the engine's.
    """

    text_ids: Tensor
    text_mask: Tensor
    neg_text_ids: Tensor
    neg_text_mask: Tensor
    video_shape: tuple[int, int, int]
    fps: float = 24.0
    num_inference_steps: int = 35
    guidance_scale: float = 6.0
    noise: Tensor | Mapping[str, Tensor] | None = None
    seed: int = 42
    sound_frames: int | None = None
    flow_shift: float | None = None
    schedule: str | None = None

    def to_denoise_request(self, *, schedule: str, flow_shift: float) -> DenoiseRequest:
        """Remove the padding, and fill the gaps with an engine's ``schedule`` and ``flow_shift``.

        Raises:
            RequestError: a field is out of bounds, or ids and mask differ in shape.
        """
        return DenoiseRequest(
            text_ids=_unpad("text", self.text_ids, self.text_mask),
            negative_text_ids=_unpad("neg_text", self.neg_text_ids, self.neg_text_mask),
            latent_shape=_latent_shape(self.video_shape),
            fps=self.fps,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            schedule=schedule if self.schedule is None else self.schedule,
            flow_shift=flow_shift if self.flow_shift is None else self.flow_shift,
            seed=self.seed,
            num_sound_latents=self.sound_frames or 0,
            noise={VIDEO: self.noise} if isinstance(self.noise, Tensor) else self.noise,
        )


def choose_schedule(use_karras_sigmas: bool | None, layout: CheckpointLayout) -> str:
    """Return the default schedule of an engine: native, karras, or with None the checkpoint's own."""
    if use_karras_sigmas is None:
        return find_shipped_schedule(layout)
    return "karras" if checks.flag("use_karras_sigmas", use_karras_sigmas) else "native"


def run_step(
    engine: Engine,
    request: Cosmos3T2VRequest,
    *,
    on_step: Callable[[StepEvent], None] | None,
    output: Literal["pixels", "latent"],
) -> Tensor | dict[str, Tensor | int]:
    """Serve one request from ids to pixels, and to sound if it asks for it.

    Returns:
        Pixels (1, 3, F, Y, X) fp32 in [0, 1]; with ``output="latent"`` the video latents [1, C, T, H, W]. With sound a
        mapping of ``video`` to these, ``sound`` to the waveform [channels, samples] fp32 in [-1, 1] (its latents
        [C, T]), and ``sample_rate`` to its samples per second.

    Raises:
        RequestError: see :meth:`Engine.denoise`.
        CapabilityError: the request asks for sound, and the engine has no decoder of it.
    """
    checks.choice("output", output, ("pixels", "latent"))
    if request.sound_frames and not engine.is_closed and not engine.has_sound:
        raise CapabilityError("sound_frames", request.sound_frames, "None", "this engine has no decoder of sound")
    results = latents = engine.denoise(request, on_step=on_step)
    if output == "pixels":
        results = {VIDEO: torch.cat([to_unit(chunk).float() for chunk in engine.decode(latents[VIDEO])], dim=2)}
        if SOUND in latents:
            results[SOUND] = torch.cat(list(engine.decode_sound(latents[SOUND])), dim=1)
    if SOUND not in results or not engine.has_sound:
        return results[VIDEO]
    return {**results, "sample_rate": engine.sampling_rate}


@dataclass(frozen=True)
class GeneratedMedia:
    """The media of one generation, on the CPU.

    Attributes:
        frames: uint8 RGB [F, Y, X, 3].
        sound: the generated waveform, float32 [channels, samples] in about [-1, 1]; None for a silent clip.
        sampling_rate: the sound's samples per second (Hz); None without sound.
    """

    frames: Frames
    sound: Samples | None = None
    sampling_rate: int | None = None


class Cosmos3GenerationPostProcessor:
    """Turns an engine's pixels and sound into files.

    Args:
        fps: frames per second of the clip.
    """

    def __init__(self, fps: float = 24.0) -> None:
        self.fps = fps

    def postprocess(self, output: Tensor | Mapping[str, Any]) -> GeneratedMedia:
        """Convert the engine's output to frames, and sound, on the CPU.

        Args:
            output: pixels (1, 3, F, Y, X) in [0, 1], or with sound the mapping ``{"video": those pixels, "sound":
                floating point [channels, samples], "sample_rate": int}``.

        Raises:
            RequestError: a tensor has another shape or dtype, or the mapping lacks a key.
        """
        if not isinstance(output, Mapping):
            return GeneratedMedia(unit_to_uint8(output).cpu().numpy())
        missing = {"video", "sound", "sample_rate"} - set(output)
        if missing:
            hint = f"missing: {', '.join(sorted(missing))}"
            raise RequestError("output", sorted(output), "a mapping with video, sound and sample_rate", hint)
        sound = output["sound"]
        if sound.ndim != 2 or not sound.is_floating_point():
            given = f"{sound.dtype} {list(sound.shape)}"
            raise RequestError("sound", given, "a floating point tensor [channels, samples]")
        frames = unit_to_uint8(output["video"]).cpu().numpy()
        return GeneratedMedia(frames, sound.detach().float().cpu().numpy(), int(output["sample_rate"]))

    def save_mp4(self, media: GeneratedMedia, path: str | Path) -> Path:
        """Write the frames as an H.264 mp4, with their sound as AAC if there is any; return its path.

        The sound ends with the video: longer sound is cut, and sound that is shorter by up to one latent of the sound
        tokenizer (1920 samples, 40 ms at 48 kHz) ends in silence. Shorter sound is refused.

        Raises:
            RequestError: the path is not in an existing directory, or the sound is too short.
            MediaError: the file could not be written.
        """
        _, height, width, _ = media.frames.shape
        samples, sound = self._track(media) if media.sound is not None else (None, None)
        with Mp4Writer(path, fps=self.fps, height=height, width=width, sound=sound) as writer:
            writer.write(media.frames)
            if samples is not None:
                writer.write_sound(samples)
        return Path(path)

    def save_wav(self, media: GeneratedMedia, path: str | Path) -> Path:
        """Write the sound alone as 16-bit PCM, the samples that :meth:`save_mp4` encodes; return its path.

        Raises:
            RequestError: there is no sound, it is too short, or the path is not in an existing directory.
            MediaError: the file could not be written.
        """
        samples, sound = self._track(media)
        with WavWriter(path, sound) as writer:
            writer.write_sound(samples)
        return Path(path)

    def _track(self, media: GeneratedMedia) -> tuple[Samples, SoundFormat]:
        """Return the samples up to the video's end, padded with a little silence if needed, and their format."""
        if media.sound is None or media.sampling_rate is None:
            raise RequestError("media.sound", None, "a waveform with its sampling_rate", "this clip was made silent")
        num_channels, num_given = media.sound.shape
        num_samples = sound_samples(len(media.frames), self.fps, media.sampling_rate)
        num_missing = max(num_samples - num_given, 0)
        if num_missing > _MAX_PADDED_SAMPLES:
            allowed = f"at least {num_samples - _MAX_PADDED_SAMPLES} samples for {len(media.frames)} frames"
            raise RequestError("media.sound", f"{num_given} samples", allowed, "check fps and sampling_rate")
        samples = np.pad(media.sound[:, :num_samples], ((0, 0), (0, num_missing)))
        return samples, SoundFormat(media.sampling_rate, num_channels, num_samples)


def _latent_shape(shape: tuple[int, int, int]) -> LatentShape:
    try:
        return LatentShape(*shape)
    except TypeError:
        raise RequestError("video_shape", shape, "latent (frames, rows, columns)") from None


def _unpad(name: str, ids: Tensor, mask: Tensor) -> tuple[int, ...]:
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape != mask.shape:
        given = f"{list(ids.shape)} and {list(mask.shape)}"
        raise RequestError(f"{name}_ids, {name}_mask", given, "two tensors of one shape (1, S)")
    num_tokens = int(mask.sum())
    if num_tokens == 0 or not bool(mask[0, :num_tokens].all()):
        raise RequestError(f"{name}_mask", mask.tolist(), "at least one 1, then zeros for the padding on the right")
    return tuple(ids[0, :num_tokens].tolist())
