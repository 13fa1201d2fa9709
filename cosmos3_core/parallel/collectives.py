"""Exchanges between ranks, which :mod:`cosmos3_core.parallel.apply` inserts into the model.

All of them are exact: nothing is dropped, and padding never reaches a result. Shape letters: S generated tokens.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# torch 2.13 renamed it and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather_runs(run: Tensor, num_ranks: int, group: Any) -> Tensor:
    """Gather every rank's run [S, ...] in order on every rank: [num_ranks S, ...]."""
    runs = run.new_empty((num_ranks * run.shape[0], *run.shape[1:]))
    _all_gather(runs, run.contiguous(), group=group)
    return runs


class SummedLinear(nn.Module):
    """A row-split linear layer that sums the ranks' partial products, and adds its bias once.

    Args:
        linear: this rank's columns.
        group: process group of the ranks that hold the others.
    """

    def __init__(self, linear: nn.Linear, group: Any) -> None:
        super().__init__()
        self.linear = linear
        self._group = group

    def forward(self, x: Tensor) -> Tensor:
        partial = F.linear(x, self.linear.weight)
        dist.all_reduce(partial, group=self._group)
        return partial if self.linear.bias is None else partial + self.linear.bias


@dataclass(frozen=True)
class TokenShare:
    """The generated tokens, split into equal runs; the last ones are padded with zeros.

    Attributes:
        index: number of this rank's run.
        count: number of runs.
        group: process group of the ranks that hold the others.
    """

    index: int
    count: int
    group: Any

    def own_rows(self, num_tokens: int) -> slice:
        """Return this rank's run of ceil(num_tokens / count) tokens; the last runs may reach past the end."""
        share = -(-num_tokens // self.count)
        return slice(self.index * share, (self.index + 1) * share)

    def all_tokens(self, x: Tensor, num_tokens: int) -> Tensor:
        """Gather every rank's run on every rank, [ceil(S / count), ...] -> [S, ...], without the padding."""
        return all_gather_runs(x, self.count, self.group)[:num_tokens]


@dataclass(frozen=True)
class BranchShare:
    """The guidance branches, one for each half of the ranks.

    Attributes:
        index: this rank's branch: 0 conditional, 1 unconditional.
        group: process group of the two ranks, one per branch, with the same share.
        is_speaker: whether this rank logs, for all of them, requests that leave the second half waiting.
        warned: kinds of request already logged, at most "image" and "video".
    """

    index: int
    group: Any
    is_speaker: bool = False
    warned: set[str] = field(default_factory=set, compare=False)

    def own_branches(self, num_branches: int, num_latent_frames: int) -> tuple[int, ...]:
        """Return the branches that this rank runs: none in the second half without guidance.

        Args:
            num_branches: branches of the request: 2, or 1 without guidance.
            num_latent_frames: latent frames of the request; 1 is an image.
        """
        kind = "image" if num_latent_frames == 1 else "video"
        if num_branches == 1 and self.is_speaker and kind not in self.warned:
            self.warned.add(kind)
            logger.warning(
                "guidance is off in a request for %s: the second half of the ranks waits while the first runs the only "
                "branch; such requests are better served with cfg=1 (said once for all requests of this kind)",
                {"image": "an image", "video": "a video"}[kind],
            )
        return (self.index,) if self.index < num_branches else ()

    def exchange(
        self, own: dict[str, Tensor] | None, like: dict[str, Tensor], num_branches: int
    ) -> list[dict[str, Tensor]]:
        """Gather every branch's predictions on every rank.

        Args:
            own: this rank's predictions, fp32; None if it ran no branch.
            like: modality -> a tensor of the predictions' shape, fp32.
        """
        results: list[dict[str, Tensor]] = [{} for _ in range(num_branches)]
        for name, shaped in like.items():
            mine = (own[name] if own is not None else torch.zeros_like(shaped)).contiguous()
            both = [torch.empty_like(mine) for _ in range(2)]
            dist.all_gather(both, mine, group=self.group)
            for branch in range(num_branches):
                results[branch][name] = both[branch]
        return results
