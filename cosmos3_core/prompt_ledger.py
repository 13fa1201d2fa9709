"""The prompts in a transformer's cache, admitted and evicted once for all ranks. No torch here.

The ranks of a gang must cache the same prompts: if one ran a prefill that another skipped, they would wait for each
other forever. So the gang's leader decides; without a gang, the :class:`cosmos3_core.denoiser.Denoiser` does.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from cosmos3_core.denoise_request import DenoiseRequest


def text_key(text_ids: Sequence[int]) -> str:
    """Return the name of a prompt: the hash of its token ids, the same in any process."""
    return hashlib.sha256(",".join(map(str, text_ids)).encode()).hexdigest()


@dataclass(frozen=True)
class PromptOrders:
    """Orders to every rank's prompt cache when a request begins; prompts are named by :func:`text_key`.

    Attributes:
        drop: prompts to drop before anything new is computed.
        keep: prompts of the request to keep for later requests.
    """

    drop: tuple[str, ...] = ()
    keep: frozenset[str] = frozenset()


class PromptLedger:
    """Decides which prompts stay cached, and evicts the least recently used ones at a bound of bytes.

    A prompt larger than the bound is never kept.

    Args:
        max_bytes: bound of all cached prompts on one rank.
        bytes_per_token: bytes of one rank's keys and values.
    """

    def __init__(self, max_bytes: int, bytes_per_token: int) -> None:
        self._max_bytes = max_bytes
        self._bytes_per_token = bytes_per_token
        self._bytes_of: OrderedDict[str, int] = OrderedDict()

    def num_kept(self, prompts: Sequence[Sequence[int]]) -> int:
        """Return how many of a request's prompts are cached."""
        return sum(text_key(text_ids) in self._bytes_of for text_ids in prompts)

    def admit(self, prompts: Sequence[Sequence[int]]) -> PromptOrders:
        """Admit a request's prompts (token ids each); return the orders for every rank."""
        before = set(self._bytes_of)
        keys = [text_key(text_ids) for text_ids in prompts]
        for key, text_ids in zip(keys, prompts, strict=True):
            num_bytes = len(text_ids) * self._bytes_per_token
            if num_bytes <= self._max_bytes:
                self._bytes_of[key] = num_bytes
                self._bytes_of.move_to_end(key)
            while sum(self._bytes_of.values()) > self._max_bytes:
                self._bytes_of.popitem(last=False)
        kept = set(self._bytes_of)
        return PromptOrders(drop=tuple(sorted(before - kept)), keep=frozenset(kept.intersection(keys)))

    def forget(self) -> PromptOrders:
        """Evict all prompts; return the orders for every rank."""
        orders = PromptOrders(drop=tuple(self._bytes_of))
        self._bytes_of.clear()
        return orders


@dataclass(frozen=True)
class RequestMemory:
    """The memory that a request holds on a rank between two steps: its state, its prompts, its positions.

    Attributes:
        bytes_per_latent: bytes of one latent row x column x frame, all channels.
        bytes_per_sound_latent, bytes_per_action: bytes of one sound latent or action, all channels.
        bytes_per_token: bytes of one generated token's position.
        bytes_per_text_token: bytes of one prompt token's keys and values.
        patch_size: latent rows and columns in a token.
    """

    bytes_per_latent: int
    bytes_per_sound_latent: int
    bytes_per_action: int
    bytes_per_token: int
    bytes_per_text_token: int
    patch_size: int

    def of(self, request: DenoiseRequest) -> int:
        """Return the bytes that a request holds."""
        frames, rows, columns = request.latent_shape
        num_actions = 0 if request.action is None else request.action.num_actions
        num_tokens = frames * math.ceil(rows / self.patch_size) * math.ceil(columns / self.patch_size)
        num_tokens += request.num_sound_latents + num_actions
        num_text_tokens = sum(len(text_ids) for text_ids in request.prompts)
        return (
            frames * rows * columns * self.bytes_per_latent
            + request.num_sound_latents * self.bytes_per_sound_latent
            + num_actions * self.bytes_per_action
            + num_tokens * self.bytes_per_token
            + num_text_tokens * self.bytes_per_text_token
        )
