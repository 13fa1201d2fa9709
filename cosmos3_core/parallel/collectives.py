"""Exchanges between ranks. Each is a visible piece that :mod:`cosmos3_core.parallel.apply` puts where it belongs.

Shape letters: S generated tokens. All of them are exact: nothing is dropped, and padding never reaches a result.
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

# torch 2.13 gave it another name and warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather_runs(run: Tensor, num_ranks: int, group: Any) -> Tensor:
    """Gather every rank's run, [S, ...] each, one behind the other: [num_ranks S, ...], on every rank."""
    runs = run.new_empty((num_ranks * run.shape[0], *run.shape[1:]))
    _all_gather(runs, run.contiguous(), group=group)
    return runs


class Summed(nn.Module):
    """A row-split linear layer whose partial products are added up over the ranks, its bias once.

    Args:
        linear: this rank's columns.
        group: of the ranks that hold the others.
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
        index: which run is this rank's.
        count: how many runs there are.
        group: of the ranks that hold the others.
    """

    index: int
    count: int
    group: Any

    def own(self, num_tokens: int) -> slice:
        """This rank's run of ``num_tokens`` tokens, ceil(num_tokens / count) long; the last ones reach past the end."""
        share = -(-num_tokens // self.count)
        return slice(self.index * share, (self.index + 1) * share)

    def all(self, x: Tensor, num_tokens: int) -> Tensor:
        """Gather every rank's run, [ceil(S / count), ...] -> [S, ...], padding taken off; on every rank."""
        return all_gather_runs(x, self.count, self.group)[:num_tokens]


@dataclass(frozen=True)
class BranchShare:
    """The guidance branches, one a group of ranks.

    Attributes:
        index: which branch is this rank's: 0 conditional, 1 unconditional.
        group: of the two ranks, one a branch, that hold the same share.
        is_speaker: this rank warns, for all of them, of requests that leave the second group waiting.
        warned: kinds of request that it has warned of, at most "image" and "video"; the log says it once a kind.
    """

    index: int
    group: Any
    is_speaker: bool = False
    warned: set[str] = field(default_factory=set, compare=False)

    def mine(self, num_branches: int, num_latent_frames: int) -> tuple[int, ...]:
        """Return the branches that this rank runs; none where guidance is off and this is the second group.

        Args:
            num_branches: how many the request has: 2, or 1 without guidance.
            num_latent_frames: of the request; says what kind it is.
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
        """Exchange every branch's predictions: all of them on every rank.

        Args:
            own: this rank's predictions, fp32; None where it ran no branch.
            like: modality -> a tensor of the predictions' shape, fp32.
            num_branches: how many there are.
        """
        results: list[dict[str, Tensor]] = [{} for _ in range(num_branches)]
        for name, shaped in like.items():
            mine = (own[name] if own is not None else torch.zeros_like(shaped)).contiguous()
            both = [torch.empty_like(mine) for _ in range(2)]
            dist.all_gather(both, mine, group=self.group)
            for branch in range(num_branches):
                results[branch][name] = both[branch]
        return results
