"""UniPC of order 2, B(h) = e^h - 1, predicting x_0 (Zhao et al. 2023, "A Unified Predictor-Corrector Framework").

Each step corrects its sample with the new prediction, then predicts the next sample. Both are linear in the samples and
x_0 predictions, with weights that depend on the schedule alone: :class:`UniPC` computes them once, in double precision,
and a step is a few multiply-adds. The only state between steps is a value, ``SolverState``.

Everything is elementwise, for tensors of any shape: names here have no shape letters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from cosmos3_core.sampler.schedule import Schedule


@dataclass(frozen=True)
class SolverState:
    """One modality between two steps; all tensors fp32.

    Attributes:
        sample: the predicted latents at the current noise level.
        corrected: the corrected sample of the last step; None before the first step.
        x0: x_0 predictions of the last steps, newest first, at most 2; from the uncorrected samples.
    """

    sample: Tensor
    corrected: Tensor | None = None
    x0: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class _Update:
    """x_next = sample * x + sum of x0[i] * x_0 prediction i (newest first)."""

    sample: float
    x0: tuple[float, ...]


class UniPC:
    """The solver for one schedule. Holds no state of any request."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        # log signal-to-noise ratio, alpha / sigma with alpha = 1 - sigma; infinite at the last level, sigma 0.
        self._lambdas = [math.log((1 - s) / s) if s > 0 else math.inf for s in schedule.sigmas]
        last = schedule.num_steps - 1
        # The predictor falls back to order 1 at the first step, without history, and at the last one; the corrector has
        # the order of the predictor that it corrects.
        self._predictors = [self._predictor(i, 1 if i in (0, last) else 2) for i in range(last + 1)]
        self._correctors = [self._corrector(i, 1 if i == 1 else 2) for i in range(1, last + 1)]

    def step(self, state: SolverState, index: int, velocity: Tensor) -> SolverState:
        """Advance from noise level ``index`` to the next.

        Args:
            index: step index, 0 .. num_steps - 1.
            velocity: the model's prediction at ``state.sample`` (noise - x_0), after guidance, fp32.
        """
        x0 = state.sample - self.schedule.sigmas[index] * velocity
        sample = state.sample
        if state.corrected is not None:
            sample = _combine(self._correctors[index - 1], state.corrected, (x0, *state.x0))
        history = (x0, *state.x0)[:2]
        return replace(state, sample=_combine(self._predictors[index], sample, history), corrected=sample, x0=history)

    def _rates(self, start: int, end: int) -> tuple[float, float, float, float]:
        """Return (sigma ratio, alpha, h, e^-h - 1) of the step from level ``start`` to level ``end``."""
        sigma, sigma_end = self.schedule.sigmas[start], self.schedule.sigmas[end]
        h = self._lambdas[end] - self._lambdas[start]
        return sigma_end / sigma, 1 - sigma_end, h, math.expm1(-h)

    def _predictor(self, index: int, order: int) -> _Update:
        """Return the update from level ``index`` to the next, with x_0 at ``index`` and, for order 2, ``index - 1``."""
        ratio, alpha, h, e = self._rates(index, index + 1)
        if order == 1:
            return _Update(ratio, (-alpha * e,))
        # D_1 = (x0_before - x0_now) / r, weighted by rho = 1/2 (the paper's simplification for order 2).
        r = (self._lambdas[index - 1] - self._lambdas[index]) / h
        slope = -alpha * e * 0.5 / r
        return _Update(ratio, (-alpha * e - slope, slope))

    def _corrector(self, index: int, order: int) -> _Update:
        """Return the update of the sample at level ``index`` by x_0 at index, index - 1 and, for order 2, index - 2."""
        ratio, alpha, h, e = self._rates(index - 1, index)
        if order == 1:
            now = -alpha * e * 0.5
            return _Update(ratio, (now, -alpha * e - now))
        # Order 2 solves [[1, 1], [r, 1]] (rho_before, rho_now) = (b_1, b_2) for B(h) = e^-h - 1.
        r = (self._lambdas[index - 2] - self._lambdas[index - 1]) / h
        phi_1 = e / -h - 1
        phi_2 = phi_1 / -h - 0.5
        b_1, b_2 = phi_1 / e, 2 * phi_2 / e
        rho_before = (b_1 - b_2) / (1 - r)
        rho_now = b_1 - rho_before
        now = -alpha * e * rho_now
        before = -alpha * e * rho_before / r
        return _Update(ratio, (now, -alpha * e - now - before, before))


def _combine(update: _Update, sample: Tensor, x0: tuple[Tensor, ...]) -> Tensor:
    result = update.sample * sample
    for weight, prediction in zip(update.x0, x0, strict=False):
        result = result.add_(prediction, alpha=weight)
    return result
