"""Schedules and solver against diffusers' scheduler, on a toy velocity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos3_core.checkpoint.configs import SchedulerConfig
from cosmos3_core.errors import RequestError
from cosmos3_core.sampler.guidance import guide, needs_two_branches
from cosmos3_core.sampler.schedule import SCHEDULES, make_schedule
from cosmos3_core.sampler.unipc import SolverState, UniPC

CONFIG = SchedulerConfig(use_karras_sigmas=True)


def diffusers_scheduler(name: str, num_steps: int, flow_shift: float):  # type: ignore[no-untyped-def]
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        solver_order=2,
        solver_type="bh2",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        sigma_max=200.0,
        sigma_min=0.147,
        final_sigmas_type="zero",
        use_karras_sigmas=name == "karras",
        flow_shift=flow_shift,
    )
    if name == "native":
        scheduler.set_timesteps(num_steps, sigmas=np.linspace(1 - 1 / 1000, 0, num_steps + 1)[:-1])
    else:
        scheduler.set_timesteps(num_steps)
    return scheduler


def velocity(x: Tensor) -> Tensor:
    return torch.sin(1.3 * x) + 0.2


@pytest.mark.parametrize("flow_shift", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 10, 35, 80])
@pytest.mark.parametrize("name", SCHEDULES)
def test_sigmas_timesteps_and_every_step_equal_diffusers(name: str, num_steps: int, flow_shift: float) -> None:
    theirs = diffusers_scheduler(name, num_steps, flow_shift)
    schedule = make_schedule(name, num_steps, flow_shift=flow_shift, config=CONFIG)
    assert schedule.num_steps == num_steps
    assert list(schedule.timesteps) == theirs.timesteps.tolist()
    assert torch.equal(torch.tensor(schedule.sigmas), theirs.sigmas)

    sample = torch.randn(1, 4, 60, generator=torch.Generator().manual_seed(0))
    state, solver = SolverState(sample), UniPC(schedule)
    for index, timestep in enumerate(theirs.timesteps):
        sample = theirs.step(velocity(sample), timestep, sample, return_dict=False)[0]
        state = solver.step(state, index, velocity(state.sample))
        assert (state.sample - sample).norm() / sample.norm() < 5e-6, index


def test_the_native_schedule_is_nvidias() -> None:
    """Ten steps at shift 3: the values that cosmos-framework's own scheduler test publishes."""
    schedule = make_schedule("native", 10, flow_shift=3.0, config=CONFIG)
    assert schedule.timesteps == (999, 963, 922, 874, 817, 749, 666, 562, 428, 249)
    assert schedule.sigmas[:2] == pytest.approx((0.99966645, 0.96394110), abs=1e-7)


def test_it_converges_faster_than_first_order() -> None:
    """On a linear ODE with a known end, halving the step divides the error by about three; Euler would halve it.

    Not by four: the first and the last step are of order 1 and sigma 1 is singular.
    """

    def end(num_steps: int) -> float:
        solver = UniPC(make_schedule("native", num_steps, flow_shift=1.0, config=CONFIG))
        state = SolverState(torch.ones(1, dtype=torch.float64))
        for index in range(num_steps):
            state = solver.step(state, index, 0.7 * state.sample)
        return float(state.sample)

    exact = np.exp(-0.7 * 0.999)
    errors = [abs(end(n) - exact) for n in (20, 40, 80)]
    assert errors[0] / errors[1] > 2.5
    assert errors[1] / errors[2] > 2.5
    assert errors[2] < 1e-4


def test_a_clean_element_stays_where_it_is() -> None:
    """Velocity 0 marks a clean latent; the solver must not move it."""
    solver = UniPC(make_schedule("native", 35, flow_shift=10.0, config=CONFIG))
    state = SolverState(torch.tensor([0.7, -1.3]))
    for index in range(35):
        state = solver.step(state, index, torch.zeros(2))
    assert torch.allclose(state.sample, torch.tensor([0.7, -1.3]), atol=1e-5)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(RequestError, match="native.*linear.*karras"):
        make_schedule("cosine", 4, flow_shift=1.0, config=CONFIG)


def test_guidance() -> None:
    c, u = torch.tensor([2.0], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16)
    assert torch.equal(guide(c, u, 6.0), torch.tensor([7.0]))
    assert guide(c, u, 6.0).dtype == torch.float32
    assert [needs_two_branches(g) for g in (0.0, 0.5, 1.0, 6.0)] == [True, True, False, True]
