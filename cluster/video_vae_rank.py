"""One rank of a video VAE's gang: decodes and encodes its strip of every frame.

Several ranks split each frame between them (:mod:`cosmos3_core.parallel.strips`); a frame that is too small for that is
rank 0's alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.envelope import TensorEnvelope
from cluster.errors import PreviewFailed
from cluster.logs import LogOrigin
from cluster.rank import Loaded, Rank, RankSpec, run_within_memory
from cosmos3_core.conditioning.picture import PictureCondition
from cosmos3_core.preview import PreviewMap

if TYPE_CHECKING:
    import torch

    from cosmos3_core.media.pixels import Frames
    from cosmos3_core.parallel.groups import RankGroup
    from cosmos3_core.parallel.strips import Strip
    from cosmos3_core.vae.video import VideoVAE

logger = logging.getLogger(__name__)

_WARM_UP = "warm up"


@dataclass(frozen=True)
class VideoVAESpec(RankSpec):
    """Settings from which a rank of a video VAE's gang loads.

    Attributes:
        num_ranks: ranks that split a frame.
        chunk_latents: latent frames per chunk after the first; None lets the VAE choose by the frames' size.
        uses_card_of_rank: rank i uses card i of the node, instead of one assigned by Ray.
        preview_cache_dir: directory of a node's fitted preview maps; None for no cache.
    """

    num_ranks: int = 1
    latent_channels: int = field(default=48, kw_only=True)
    chunk_latents: int | None = field(default=None, kw_only=True)
    uses_card_of_rank: bool = field(default=False, kw_only=True)
    preview_cache_dir: str | None = field(default=None, kw_only=True)

    @property
    def rank_class(self) -> type[Rank]:
        return VideoVAERank

    @property
    def warm_up(self) -> list[tuple[str, tuple[Any, ...]]]:
        # One column for each rank.
        latents = np.zeros((1, self.latent_channels, 2, 1, self.num_ranks), np.float32)
        next_strip = ("next_strip", (_WARM_UP,))
        return [
            ("begin", (_WARM_UP, TensorEnvelope.of_array(latents))),
            next_strip,
            next_strip,
            ("end", (_WARM_UP,)),
            ("prepare_previews", ()),
        ]


@dataclass(frozen=True)
class ChunkStrip:
    """A rank's part of a chunk of frames.

    Attributes:
        frames: uint8 RGB [F, Y, X, 3]; without rows on other ranks if rank 0 does the whole frame.
        axis: along which the ranks' strips adjoin, 1 (rows) or 2 (columns).
    """

    frames: TensorEnvelope
    axis: int
    pid: int


class VideoVAERank(Rank):
    """Decodes and encodes this rank's strip of every frame."""

    def __init__(self, rank: int, spec: VideoVAESpec) -> None:
        super().__init__(rank, spec)
        self._chunk_latents = spec.chunk_latents
        self._is_card_by_rank = spec.uses_card_of_rank
        self._preview_cache_dir = spec.preview_cache_dir
        self._group: RankGroup | None = None
        self._clips: dict[str, tuple[int, Iterator[Frames]]] = {}
        self._preview_map: PreviewMap | None = None

    @cached_property
    def _device(self) -> torch.device:
        from cosmos3_core.device import local_device

        return local_device(self._spec.device, self._rank) if self._is_card_by_rank else super()._device

    def load(self) -> Loaded:
        """Load the VAE: every rank has all of it."""
        import torch

        from cosmos3_core.checkpoint.layout import CheckpointLayout
        from cosmos3_core.checkpoint.load import load_video_vae

        start_s = time.perf_counter()
        torch.set_num_threads(self._spec.num_threads)
        layout = CheckpointLayout.open(self._spec.checkpoint)
        self._loaded_model = load_video_vae(layout, device=self._device, dtype=self._dtype)
        return Loaded(time.perf_counter() - start_s, {})

    def encode(
        self, picture: PictureCondition, frames: TensorEnvelope, origin: LogOrigin | None = None
    ) -> TensorEnvelope | None:
        """Encode a request's given frames on all ranks; rank 0 returns the latents, fp32 [1, C, T, H, W].

        Args:
            picture: the given frames' description, without its media.
            frames: of :func:`cosmos3_core.conditioning.picture.read_picture`.

        Raises:
            OutOfMemory: it does not fit.
        """
        from cosmos3_core.conditioning.clean import clean_latents

        vae: VideoVAE = self._model
        with self._log.run("encode", origin):
            latents = run_within_memory(
                self._device, lambda: clean_latents(vae, picture, frames.array(), part_of=self._strip_of)
            )
        return TensorEnvelope.of_tensor(latents) if self._rank == 0 else None

    def prepare_previews(self) -> None:
        """Make rank 0's :meth:`preview_map` during warm-up, so that no clip waits for it.

        A failure is logged; the next call for the map tries again.
        """
        if self._rank == 0:
            try:
                self.preview_map()
            except PreviewFailed as error:
                logger.warning("there is no map of previews yet: %s", error.reason)

    def preview_map(self) -> PreviewMap:
        """Return this VAE's preview map, fitted or read from the cache the first time. Needs no other rank.

        Raises:
            PreviewFailed: it cannot be made now; the rank is as it was.
        """
        from cosmos3_core.preview_fit import load_preview_map

        if self._preview_map is not None:
            return self._preview_map
        cache_dir = None if self._preview_cache_dir is None else Path(self._preview_cache_dir)
        try:
            self._preview_map = run_within_memory(self._device, lambda: load_preview_map(self._model, cache_dir))
            return self._preview_map
        except Exception as error:  # noqa: BLE001 - a rank that raises anything else fails its gang, with all clips
            raise PreviewFailed(f"{type(error).__name__}: {error}") from None

    def begin(self, clip_id: str, latents: TensorEnvelope, origin: LogOrigin | None = None) -> None:
        """Begin to decode a clip.

        Args:
            latents: [1, C, T, H, W] fp32.

        Raises:
            RequestError: the latents have another shape.
        """
        from cosmos3_core.device import HostCopies
        from cosmos3_core.vae.to_host import frames_on_host

        with self._log.begin(clip_id, origin):
            vae: VideoVAE = self._model
            whole = latents.tensor_view()
            vae.check_latents(whole)
            strip = self._strip_of(*whole.shape[-2:])
            chunks = vae.decode(whole, chunk_latents=self._chunk_latents, part=strip)
            axis = strip.pixels(vae.geometry.spatial).axis
            self._clips[clip_id] = axis, frames_on_host(chunks, HostCopies(self._device))

    def next_strip(self, clip_id: str) -> ChunkStrip | None:
        """Return this rank's part of a clip's next chunk, None after the last; on OutOfMemory the clip is forgotten."""
        axis, strips = self._clips[clip_id]
        with self._log.resume(clip_id, "decode"):
            frames = run_within_memory(self._device, lambda: next(strips, None), lambda: self.end(clip_id))
        return None if frames is None else ChunkStrip(TensorEnvelope.of_array(frames), axis, os.getpid())

    def end(self, clip_id: str) -> None:
        """Forget a clip, if it is there."""
        self._clips.pop(clip_id, None)
        self._log.end(clip_id)

    def _make_groups(self, store: Any) -> None:
        from cosmos3_core.parallel.groups import init_group

        num_ranks, timeout_s = self._spec.num_ranks, self._spec.collective_timeout_s
        self._group = init_group(num_ranks, self._rank, self._device, timeout_s=timeout_s, store=store)

    def _strip_of(self, height: int, width: int) -> Strip:
        """Return this rank's strip of frames of ``height`` x ``width`` latents."""
        from cosmos3_core.parallel.groups import RankGroup
        from cosmos3_core.parallel.strips import strip_of

        return strip_of(self._group if self._group is not None else RankGroup(), height, width)
