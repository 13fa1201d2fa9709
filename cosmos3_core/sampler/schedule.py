"""Noise schedules: how much noise is left at each step.

Flow matching: x_sigma = (1 - sigma) x_0 + sigma noise, sigma from 1 to 0. The three published schedules:

    native   NVIDIA's own: evenly spaced, then shifted towards noise by ``flow_shift``; the default
    linear   diffusers' with use_karras_sigmas off: native with other end points
    karras   the one that checkpoints ship (Karras et al. 2022, rho 7, on sigma / (1 - sigma)); ignores ``flow_shift``

No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cosmos3_core.checkpoint.configs import SchedulerConfig
from cosmos3_core.errors import RequestError
from cosmos3_core.presets import SCHEDULES

_KARRAS_RHO = 7.0
# sigma 1 would make log(1 - sigma) infinite in the solver; the published pipelines back off by this much.
_FROM_ONE = 1e-6


@dataclass(frozen=True)
class Schedule:
    """A schedule of n steps.

    Attributes:
        name: one of ``SCHEDULES``.
        sigmas: n + 1 noise levels, descending, the last 0; fp32 values.
        timesteps: n integers for the model, sigma * 1000 truncated; neighbours may be equal beyond ~100 steps.
    """

    name: str
    sigmas: tuple[float, ...]
    timesteps: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


def make_schedule(name: str, num_steps: int, *, flow_shift: float, config: SchedulerConfig) -> Schedule:
    """Make the schedule called ``name`` with ``num_steps`` steps.

    Args:
        num_steps: denoising steps, at least 1.
        flow_shift: k in sigma -> k sigma / (1 + (k - 1) sigma), above 0; no effect on ``karras``.
        config: the checkpoint's; gives the training timesteps and karras' range.

    Raises:
        RequestError: the name is unknown.
    """
    if name == "karras":
        ramp = np.linspace(0, 1, num_steps)
        low, high = config.sigma_min ** (1 / _KARRAS_RHO), config.sigma_max ** (1 / _KARRAS_RHO)
        ratio = (high + ramp * (low - high)) ** _KARRAS_RHO
        sigmas = ratio / (ratio + 1)
    elif name in ("native", "linear"):
        unit = 1 / config.num_train_timesteps
        start, end = (1 - unit, 0.0) if name == "native" else (1.0, unit)
        sigmas = np.linspace(start, end, num_steps + 1)[:-1]
        sigmas = flow_shift * sigmas / (1 + (flow_shift - 1) * sigmas)
        if abs(sigmas[0] - 1) < _FROM_ONE:
            sigmas[0] -= _FROM_ONE
    else:
        raise RequestError("schedule", name, f"one of {list(SCHEDULES)}")
    timesteps = (sigmas * config.num_train_timesteps).astype(np.int64)
    return Schedule(name, (*sigmas.astype(np.float32).tolist(), 0.0), tuple(timesteps.tolist()))
