"""Cache of prompts' keys and values by the hash of their token ids.

Most requests share the default negative prompt, which is prefilled once; a repeated prompt costs nothing.
:mod:`cosmos3_core.prompt_ledger` decides which prompts stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cosmos3_core.model.towers import TextKV
from cosmos3_core.prompt_ledger import PromptOrders, text_key


class TextCache:
    """Holds the :class:`TextKV` of the prompts that a ledger orders to keep. Not thread-safe.

    Args:
        prefill: token ids [L] -> TextKV; called on a miss.

    Attributes:
        num_prefills: number of calls of ``prefill``.
    """

    def __init__(self, prefill: Callable[[Tensor], TextKV]) -> None:
        self._prefill = prefill
        self._entries: dict[str, TextKV] = {}
        self.num_prefills = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all entries."""
        return sum(entry.num_bytes for entry in self._entries.values())

    def fetch(self, prompts: Sequence[Sequence[int]], orders: PromptOrders) -> list[TextKV]:
        """Return the keys and values of a request's prompts, cached or computed now, and follow the orders."""
        keys = [text_key(text_ids) for text_ids in prompts]
        # Taken before the drop: the orders may evict a prompt that this request still uses.
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
        """Drop the entries that the orders name."""
        for key in orders.drop:
            self._entries.pop(key, None)
