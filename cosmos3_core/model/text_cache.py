"""Keys and values of prompts that were seen before, by the hash of their token ids.

A default negative prompt comes with every request, so its prefill is paid once; a repeated prompt costs nothing.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cosmos3_core.model.towers import TextKV

DEFAULT_MAX_BYTES = 4 * 2**30


def text_key(text_ids: Sequence[int]) -> str:
    """Name of a prompt: the hash of its token ids, the same in any process."""
    return hashlib.sha256(",".join(map(str, text_ids)).encode()).hexdigest()


class TextCache:
    """Least-recently-used cache of :class:`TextKV`, bounded by bytes. For one thread.

    An entry larger than the whole bound is handed out but not kept.

    Args:
        prefill: token ids [L] -> TextKV; called on a miss.
        max_bytes: bound on the sum of the entries' bytes.

    Attributes:
        num_prefills: how often ``prefill`` was called.
    """

    def __init__(self, prefill: Callable[[Tensor], TextKV], max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._prefill = prefill
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, TextKV] = OrderedDict()
        self.num_prefills = 0

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self._entries.values())

    def get(self, text_ids: Sequence[int]) -> TextKV:
        """The prompt's keys and values, from the cache or computed now."""
        key = text_key(text_ids)
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        self.num_prefills += 1
        entry = self._prefill(torch.tensor(text_ids))
        if entry.num_bytes <= self._max_bytes:
            self._entries[key] = entry
            while self.num_bytes > self._max_bytes:
                self._entries.popitem(last=False)
        return entry

    def clear(self) -> None:
        """Forget every entry."""
        self._entries.clear()
