"""The work of a request and the speed of a runner, from which waiting times are estimated.

Work is counted in token-steps: steps x guidance branches x generated tokens. The cost of a token grows with their
number, because attention is quadratic: on Nano attention and the rest of a layer cost the same at 23,600 tokens,
between 480p and 720p. The prompt's tower and the decoders are not counted: the speed, measured from a request's start
to its file, includes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.request import ResolvedRequest
from cosmos3_core.sampler.guidance import needs_two_branches
from cosmos3_core.shapes import Geometry

# Time constant with which measurements decay.
_MEMORY_S = 600.0
_SHORTEST_S = 1e-3
# Bound on the busy spans kept.
_MAX_SPANS = 1000


@dataclass(frozen=True)
class CostModel:
    """Computes the work of a checkpoint's requests.

    Attributes:
        tokens_at_par: number of tokens at which attention takes as long as everything else in a layer.
    """

    geometry: Geometry
    tokens_at_par: float

    @classmethod
    def of(cls, geometry: Geometry, config: TransformerConfig) -> CostModel:
        """Derive the cost model from the sizes of a checkpoint's generation tower (``cosmos3_core.model.towers``)."""
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        num_matrices = 2 if config.hidden_act == "relu2" else 3
        # Multiplications per token: in the layer's matrices, and in scores and values for each attended token.
        matrices = config.hidden_size * (2 * query + 2 * key + num_matrices * config.intermediate_size)
        return cls(geometry, matrices / (2 * query))

    def compute_work(self, request: ResolvedRequest) -> float:
        """Compute the work of a whole request, in token-steps."""
        num_tokens = self.geometry.num_tokens(request.num_frames, request.height, request.width)
        num_tokens += request.num_sound_latents
        num_tokens += 0 if request.action is None else request.action.chunk_size
        num_branches = 2 if needs_two_branches(request.guidance_scale) else 1
        return request.num_inference_steps * num_branches * num_tokens * (1 + num_tokens / self.tokens_at_par)


class Throughput:
    """Measures the speed of one runner in a lane over the last minutes.

    Jobs overlap, so the speed is the sum of their work over the union of their times; idle time does not count.
    """

    def __init__(self) -> None:
        # Busy spans without overlaps, as (begin, end).
        self._busy: list[tuple[float, float]] = []
        self._work = self._busy_s = 0.0

    def add(self, work: float, start_s: float, end_s: float) -> float:
        """Add a finished request, with times of any one clock; return the work per second."""
        # Count only time that no earlier request was running: a short request may end inside a long one.
        joined = [span for span in self._busy if span[0] <= end_s and start_s <= span[1]]
        counted_s = sum(min(end, end_s) - max(begin, start_s) for begin, end in joined)
        busy_s = max(end_s - start_s - counted_s, 0.0)
        span = (min([start_s, *(begin for begin, _ in joined)]), max([end_s, *(end for _, end in joined)]))
        apart = [other for other in self._busy if other not in joined]
        self._busy = sorted([*apart, span])[-_MAX_SPANS:]
        share = math.exp(-busy_s / _MEMORY_S)
        self._work = share * self._work + work
        self._busy_s = share * self._busy_s + busy_s
        return self._work / max(self._busy_s, _SHORTEST_S)
