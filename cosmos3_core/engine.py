"""A loaded checkpoint in one process: tokenised requests in, pixels, sound and actions out.

:func:`cosmos3_core.generate.generate` is the path from a prompt to a file; the calls of PhyAI are in
:mod:`cosmos3_core.phyai`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor

from cosmos3_core import checks, phyai
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import check_weights, load_audio_vae, load_transformer, load_video_vae
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
from cosmos3_core.processor import Cosmos3Processor, PromptIds, load_tokenizer
from cosmos3_core.request import FIELDS, ResolvedRequest
from cosmos3_core.resolve import find_shipped_schedule
from cosmos3_core.sampler.state import DenoiseState
from cosmos3_core.vae.audio import AudioVAE
from cosmos3_core.vae.video import VideoVAE

_CLOSED = "this engine was closed; make a new one"


class Engine:
    """A checkpoint, loaded. Use as a context manager, or call :meth:`close`.

    Args:
        checkpoint_dir: a checkpoint in the published layout, on a local path.
        flow_shift: default of requests that give none.
        use_karras_sigmas: default schedule: False native, True karras, None as the checkpoint's scheduler says.
        load_sound: True loads the decoder of sound, False does without; None loads it where there is one.
        dtype: of the weights; None keeps what is stored.
        device: None takes the first GPU, or the CPU where there is none.
        text_cache_bytes: bound of the cache of prompts' keys and values.
        ops: operator -> implementation name, to override the choice.
        groups: this process's part in a layout of several ranks; every rank then makes the same calls and gets the same
            results, but for :meth:`frames`. All of them share the frames of pictures, in strips, whatever the layout.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        RequestError: no such device or operator.
        CapabilityError: sound was asked for, and the checkpoint makes none.
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
        if use_karras_sigmas is not None:
            checks.flag("use_karras_sigmas", use_karras_sigmas)
        # Before gigabytes are read: a damaged VAE should not be found behind a loaded transformer.
        check_weights(self.layout)
        self.schedule = (
            find_shipped_schedule(self.layout)
            if use_karras_sigmas is None
            else ("karras" if use_karras_sigmas else "native")
        )
        self.tokenizer = load_tokenizer(self.layout.component_dir("text_tokenizer"))
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
    def denoiser(self) -> Denoiser:
        """The transformer's half.

        Raises:
            ClosedError: the engine was closed.
        """
        if self._denoiser is None:
            raise ClosedError(_CLOSED)
        return self._denoiser

    def tokenize(self, request: ResolvedRequest) -> tuple[PromptIds, PromptIds]:
        """Return the token ids of both branches of a resolved request."""
        processor = Cosmos3Processor.for_request(request, self.layout.component_dir("text_tokenizer"), self.tokenizer)
        return processor.token_id_pair(request.prompt, request.negative_prompt)

    @property
    def is_closed(self) -> bool:
        """Whether the weights are gone."""
        return self._denoiser is None

    @property
    def has_sound(self) -> bool:
        """Whether the decoder of sound is loaded."""
        return self._audio_vae is not None

    @property
    def sampling_rate(self) -> int:
        """Samples a second of the sound; 0 without its decoder."""
        return 0 if self._audio_vae is None else self._audio_vae.sampling_rate

    def clean_latents(self, picture: PictureCondition) -> Tensor:
        """Encode the frames that a request's image or clip gives; see :mod:`cosmos3_core.conditioning.clean`.

        Raises:
            RequestError: the media is damaged, or larger than allowed.
            ClosedError: the engine was closed.
        """
        return clean_latents(self._video_vae, picture, read_picture(picture), partial(strip_of, self.ranks))

    def denoise(
        self,
        request: Cosmos3T2VRequest | DenoiseRequest,
        *,
        on_step: Callable[[StepEvent], None] | None = None,
        resume: DenoiseState | None = None,
    ) -> dict[str, Tensor]:
        """Run the denoising loop.

        Args:
            request: the tokenised request.
            on_step: called after every step.
            resume: a state of the same request to go on from.

        Returns:
            modality -> latents, fp32, on the engine's device: ``video`` [1, C, T, H, W], and where the request has them
            ``sound`` [C, T] and ``action`` [T, C].

        Raises:
            RequestError: see :meth:`Denoiser.prepare`.
            StateError: ``resume`` is another request's.
            ClosedError: the engine was closed.
        """
        denoiser = self.denoiser
        if isinstance(request, Cosmos3T2VRequest):
            request = request.to_denoise_request(schedule=self.schedule, flow_shift=self.flow_shift)
        plan = denoiser.prepare(request)
        state = resume.to(self.device) if resume is not None else None
        return denoiser.run(plan, state, on_step).latents

    def decode(self, latents: Tensor, *, chunk_latents: int | None = None) -> Iterator[Tensor]:
        """Decode latents as a stream.

        Args:
            latents: the video ones of :meth:`denoise`, [1, C, T, H, W].
            chunk_latents: latent frames a chunk, after the first, which stands alone; None: as
                :meth:`VideoVAE.decode` chooses.

        Yields:
            Pixels [1, 3, F, Y, X] in [-1, 1]: one frame first, then ``chunk_latents`` x 4 at a time; whole frames on
            every rank. :meth:`frames` moves less.
        """
        strip, chunks = self._strips(latents, chunk_latents)
        return map(strip.share, chunks)

    def frames(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode latents as a stream of RGB bytes, which travel between ranks as such.

        Args:
            latents: the video ones of :meth:`denoise`, [1, C, T, H, W].

        Yields:
            uint8 [F, Y, X, 3] on the engine's device, chunked as :meth:`decode` does by itself; on the first rank. The
            others yield nothing, and have to ask all the same: they decode their strips meanwhile.
        """
        strip, chunks = self._strips(latents, None)
        return _collect(strip, chunks)

    def _strips(self, latents: Tensor, chunk_latents: int | None) -> tuple[Strip, Iterator[Tensor]]:
        """Return this rank's strip, and its pixels chunk by chunk."""
        vae = self._video_vae
        vae.check_latents(latents)
        strip = strip_of(self.ranks, *latents.shape[-2:])
        return strip, vae.decode(latents, chunk_latents=chunk_latents, part=strip)

    def decode_sound(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode sound latents [C, T] of :meth:`denoise` as a stream.

        Yields:
            Samples [channels, n], fp32 in [-1, 1], on the engine's device; a little more than the pictures' time.

        Raises:
            CapabilityError: the engine was made without sound.
            ClosedError: the engine was closed.
        """
        if self._audio_vae is None:
            if self._vae is None:
                raise ClosedError(_CLOSED)
            raise CapabilityError(
                "sound", "latents", "left out", "this engine has no decoder of sound; make it with load_sound=True"
            )
        return self._audio_vae.decode(latents)

    @property
    def _video_vae(self) -> VideoVAE:
        if self._vae is None:
            raise ClosedError(_CLOSED)
        return self._vae

    def step(
        self,
        request: Cosmos3T2VRequest,
        *,
        on_step: Callable[[StepEvent], None] | None = None,
        output: Literal["pixels", "latent"] = "pixels",
    ) -> Tensor | dict[str, Tensor | int]:
        """Serve one request from ids to pixels, and sound where it asks for some.

        Returns:
            Pixels (1, 3, F, Y, X) fp32 in [0, 1]; with ``output="latent"`` the video latents [1, C, T, H, W]. With
            sound a mapping of ``video`` to these, ``sound`` to the waveform [channels, samples] fp32 in [-1, 1] (its
            latents [C, T]), and ``sample_rate`` to its samples a second.

        Raises:
            RequestError: see :meth:`denoise`.
            CapabilityError: sound, of an engine without.
            ClosedError: the engine was closed.
        """
        return phyai.run_step(self, request, on_step=on_step, output=output)

    def close(self) -> None:
        """Let go of the weights and caches. Closing twice is fine; using the engine afterwards is a ClosedError."""
        self._denoiser = None
        self._vae = None
        self._audio_vae = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _collect(strip: Strip, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    for chunk in chunks:
        frames = strip.collect(to_uint8(chunk))
        del chunk  # or it would live until the next one is there
        if frames is not None:
            yield frames
