"""Keys and values of prompts that were seen before, by the hash of their token ids.

A default negative prompt comes with every request, so its prefill is paid once; a repeated prompt costs nothing. What
is kept is decided in :mod:`cosmos3_core.prompt_ledger`; here it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cosmos3_core.model.towers import TextKV
from cosmos3_core.prompt_ledger import PromptOrders, text_key


class TextCache:
    """Holds :class:`TextKV` of prompts as it is told to. For one thread.

    Args:
        prefill: token ids [L] -> TextKV; called on a miss.

    Attributes:
        num_prefills: how often ``prefill`` was called.
    """

    def __init__(self, prefill: Callable[[Tensor], TextKV]) -> None:
        self._prefill = prefill
        self._entries: dict[str, TextKV] = {}
        self.num_prefills = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(entry.num_bytes for entry in self._entries.values())

    def take(self, prompts: Sequence[Sequence[int]], orders: PromptOrders) -> list[TextKV]:
        """Return the keys and values of a request's prompts, kept ones or computed now; the orders are carried out."""
        keys = [text_key(text_ids) for text_ids in prompts]
        # Held on to before anything is dropped: a prompt may leave the cache with the request that uses it once more.
        taken = {key: self._entries[key] for key in keys if key in self._entries}
        self.drop(orders)
        for key, text_ids in zip(keys, prompts, strict=True):
            if key not in taken:
                self.num_prefills += 1
                taken[key] = self._prefill(torch.tensor(text_ids))
            if key in orders.keep:
                self._entries[key] = taken[key]
        return [taken[key] for key in keys]

    def drop(self, orders: PromptOrders) -> None:
        """Forget what the orders name."""
        for key in orders.drop:
            self._entries.pop(key, None)
