"""A loaded checkpoint in one process: tokenized requests in, pixels, sound and actions out.

:func:`cosmos3_core.generate.generate` is the path from a prompt to a file; PhyAI's classes are in
:mod:`cosmos3_core.phyai`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal, TypeVar

import torch
from torch import Tensor

from cosmos3_core import phyai
from cosmos3_core.checkpoint.components import check_weights
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import load_audio_vae, load_transformer, load_video_vae
from cosmos3_core.conditioning.clean import clean_latents
from cosmos3_core.conditioning.picture import PictureCondition, read_picture
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.denoiser import DEFAULT_TEXT_CACHE_BYTES, Denoiser, StepEvent
from cosmos3_core.device import DTYPES, resolve_device
from cosmos3_core.errors import CapabilityError, ClosedError, RequestError
from cosmos3_core.media.pixels import to_uint8
from cosmos3_core.parallel.apply import branch_share, parallelize
from cosmos3_core.parallel.groups import ALONE, Groups, connect
from cosmos3_core.parallel.strips import Strip, strip_of
from cosmos3_core.phyai import Cosmos3T2VRequest
from cosmos3_core.prompts import PromptIds, load_tokenizer, tokenize_prompts
from cosmos3_core.request import FIELDS, ResolvedRequest
from cosmos3_core.sampler.state import DenoiseState
from cosmos3_core.vae.audio import AudioVAE
from cosmos3_core.vae.video import VideoVAE

T = TypeVar("T")


class Engine:
    """A loaded checkpoint. Use it as a context manager, or call :meth:`close`; a closed engine raises ClosedError.

    Args:
        checkpoint_dir: a checkpoint in the published layout, on a local path.
        flow_shift: default of PhyAI's requests.
        use_karras_sigmas: default schedule of PhyAI's requests: False native, True karras, None the checkpoint's own.
        load_sound: True loads the sound decoder, False does not; None loads it if the checkpoint has one.
        dtype: of the weights; None keeps the stored one.
        device: None takes the first GPU, or the CPU without one.
        text_cache_bytes: bound of the cache of prompts' keys and values.
        ops: operator -> implementation name, to override the choice.
        groups: this process's groups in a layout of several ranks. Every rank makes the same calls and gets the same
            results, except from :meth:`frames`; each works on a strip of every picture.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        RequestError: there is no such device, dtype or operator, or a default is out of bounds.
        CapabilityError: ``load_sound`` is True and the checkpoint makes no sound.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        *,
        flow_shift: float = 10.0,
        use_karras_sigmas: bool | None = False,
        load_sound: bool | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        text_cache_bytes: int = DEFAULT_TEXT_CACHE_BYTES,
        ops: Mapping[str, str] | None = None,
        groups: Groups = ALONE,
    ) -> None:
        self.layout = CheckpointLayout.open(checkpoint_dir)
        if load_sound and not self.layout.has_sound:
            raise CapabilityError("load_sound", True, "None or False", f"{self.layout.name} makes no sound")
        self.device = resolve_device(device)
        if dtype is not None and dtype not in DTYPES.values():
            raise RequestError("dtype", dtype, f"one of {[str(known) for known in DTYPES.values()]}, or None")
        self.flow_shift: float = FIELDS["flow_shift"].check("flow_shift", flow_shift)
        self.schedule = phyai.choose_schedule(use_karras_sigmas, self.layout)
        # Headers only: a damaged VAE is found before the transformer is read.
        check_weights(self.layout)
        self.tokenizer_dir = self.layout.component_dir("text_tokenizer")
        self.tokenizer = load_tokenizer(self.tokenizer_dir)
        self.ranks = groups.everyone
        connect(self.ranks, self.device)
        shard = groups.layout.shard(groups.rank)
        transformer = load_transformer(self.layout, device=self.device, dtype=dtype, ops=ops, shard=shard)
        parallelize(transformer, groups)
        self._denoiser: Denoiser | None = Denoiser(
            transformer,
            self.layout.geometry,
            self.layout.scheduler,
            text_cache_bytes=text_cache_bytes,
            branch_share=branch_share(groups),
        )
        self._vae: VideoVAE | None = load_video_vae(self.layout, device=self.device, dtype=dtype)
        self._audio_vae: AudioVAE | None = None
        if load_sound or (load_sound is None and self.layout.has_sound):
            self._audio_vae = load_audio_vae(self.layout, device=self.device, dtype=dtype)

    @property
    def is_closed(self) -> bool:
        """Whether the weights have been released."""
        return self._denoiser is None

    @property
    def has_sound(self) -> bool:
        """Whether the sound decoder is loaded."""
        return self._audio_vae is not None

    @property
    def sampling_rate(self) -> int:
        """Samples of sound a second; 0 without a decoder."""
        return 0 if self._audio_vae is None else self._audio_vae.sampling_rate

    @property
    def denoiser(self) -> Denoiser:
        """The transformer and its denoising steps."""
        return _require_open(self._denoiser)

    def tokenize(self, request: ResolvedRequest) -> tuple[PromptIds, PromptIds]:
        """Return the token ids of a request's prompt and negative prompt."""
        prompts = request.prompt, request.negative_prompt
        return tokenize_prompts(*prompts, request.prompt_format, self.tokenizer, self.tokenizer_dir)

    def clean_latents(self, picture: PictureCondition) -> Tensor:
        """Encode the frames that a request's image or clip fixes; see :mod:`cosmos3_core.conditioning.clean`.

        Raises:
            RequestError: the media is damaged, or larger than its bounds.
        """
        return clean_latents(_require_open(self._vae), picture, read_picture(picture), partial(strip_of, self.ranks))

    def denoise(
        self,
        request: Cosmos3T2VRequest | DenoiseRequest,
        *,
        on_step: Callable[[StepEvent], None] | None = None,
        resume: DenoiseState | None = None,
    ) -> dict[str, Tensor]:
        """Run the denoising loop.

        Args:
            resume: a state of the same request to resume from.

        Returns:
            modality -> latents, fp32, on the engine's device: ``video`` [1, C, T, H, W], and if the request has them
            ``sound`` [C, T] and ``action`` [T, C].

        Raises:
            RequestError: see :meth:`Denoiser.prepare`.
            StateError: ``resume`` is another request's.
        """
        denoiser = self.denoiser
        if isinstance(request, Cosmos3T2VRequest):
            request = request.to_denoise_request(schedule=self.schedule, flow_shift=self.flow_shift)
        return denoiser.run(denoiser.prepare(request), resume, on_step).latents

    def decode(self, latents: Tensor, *, chunk_latents: int | None = None) -> Iterator[Tensor]:
        """Decode video latents [1, C, T, H, W] of :meth:`denoise` as a stream; :meth:`frames` moves fewer bytes.

        Args:
            chunk_latents: latent frames per chunk after the first; see :meth:`VideoVAE.decode`.

        Yields:
            Pixels [1, 3, F, Y, X] in [-1, 1], whole frames on every rank: one frame first, then ``chunk_latents`` x 4.
        """
        strip, chunks = self._decode_strip(latents, chunk_latents)
        return map(strip.share, chunks)

    def frames(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode video latents [1, C, T, H, W] of :meth:`denoise` as a stream of RGB bytes.

        Yields:
            uint8 [F, Y, X, 3] on the engine's device, in the chunks of :meth:`decode`, on the first rank. The other
            ranks yield nothing; they must iterate all the same, because that decodes their strips.
        """
        strip, chunks = self._decode_strip(latents)
        # Chained iterators: no variable holds a chunk of pixels while the next one is decoded.
        return (frames for frames in map(strip.collect, map(to_uint8, chunks)) if frames is not None)

    def _decode_strip(self, latents: Tensor, chunk_latents: int | None = None) -> tuple[Strip, Iterator[Tensor]]:
        """Return this rank's strip of the frames, and its pixels chunk by chunk."""
        vae = _require_open(self._vae)
        vae.check_latents(latents)
        strip = strip_of(self.ranks, *latents.shape[-2:])
        return strip, vae.decode(latents, chunk_latents=chunk_latents, part=strip)

    def decode_sound(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode sound latents [C, T] of :meth:`denoise` as a stream.

        Yields:
            Samples [channels, n], fp32 in [-1, 1], on the engine's device; a little longer than the pictures.

        Raises:
            CapabilityError: the engine was made without sound.
        """
        _require_open(self._denoiser)
        if self._audio_vae is None:
            hint = "this engine has no sound decoder; make it with load_sound=True"
            raise CapabilityError("sound", "latents", "left out", hint)
        return self._audio_vae.decode(latents)

    def step(
        self,
        request: Cosmos3T2VRequest,
        *,
        on_step: Callable[[StepEvent], None] | None = None,
        output: Literal["pixels", "latent"] = "pixels",
    ) -> Tensor | dict[str, Tensor | int]:
        """Serve one of PhyAI's requests from ids to pixels; see :func:`cosmos3_core.phyai.run_step`."""
        return phyai.run_step(self, request, on_step=on_step, output=output)

    def close(self) -> None:
        """Release the weights and caches; idempotent."""
        self._denoiser = self._vae = self._audio_vae = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _require_open(part: T | None) -> T:
    """Return a part of an engine; raise ClosedError once it has been released."""
    if part is None:
        raise ClosedError("this engine was closed; make a new one")
    return part
