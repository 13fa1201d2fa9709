"""Work of requests, and measured throughput."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.request import GenerationRequest
from cosmos3_core.resolve import resolve
from cosmos3_core.shapes import Geometry
from deployments.jobs.estimates import CostModel, Throughput


def test_attention_share_of_work_matches_nano() -> None:
    """720p: 44,160 tokens, of which attention is 66 % (2427 of 3654 TFLOP a step, both branches)."""
    cost = CostModel.of(Geometry(), TransformerConfig())
    assert cost.attention_parity_tokens == pytest.approx(23_552)
    share = 44_160 / cost.attention_parity_tokens / (1 + 44_160 / cost.attention_parity_tokens)
    assert share == pytest.approx(0.66, abs=0.01)


def test_work_counts_steps_branches_and_tokens(tiny_nano: Path) -> None:
    layout = CheckpointLayout.open(tiny_nano)
    cost = CostModel(Geometry(), 1e12)  # attention costs nothing

    def work(**fields: object) -> float:
        request = GenerationRequest(prompt="a", height=64, width=64, **fields)  # type: ignore[arg-type]
        return cost.compute_work(resolve(request, layout))

    one = work(num_frames=1, num_inference_steps=1, guidance_scale=1.0)
    assert one == pytest.approx(4)
    assert work(num_frames=1, num_inference_steps=10, guidance_scale=1.0) == pytest.approx(10 * one)
    assert work(num_frames=1, num_inference_steps=1, guidance_scale=6.0) == pytest.approx(2 * one)
    assert work(num_frames=9, num_inference_steps=1, guidance_scale=1.0) == pytest.approx(3 * one)
    sound = work(num_frames=9, num_inference_steps=1, guidance_scale=1.0, generate_sound=True)
    assert sound == pytest.approx(3 * one + 10), "9 frames at 24 per second are 10 latents of sound"
    tight = CostModel(Geometry(), 4.0)
    request = GenerationRequest(prompt="a", height=64, width=64, num_frames=1, num_inference_steps=1, guidance_scale=1)
    assert tight.compute_work(resolve(request, layout)) == pytest.approx(8), "at par a token counts twice"


def test_throughput_of_sequential_jobs_is_that_of_each() -> None:
    alone = Throughput()
    for number in range(5):
        assert alone.add(100, start_s=10 * number, end_s=10 * number + 10) == pytest.approx(10)


@pytest.mark.parametrize("apart_s", [0.0, 0.1, 5.0])
def test_throughput_of_concurrent_jobs_is_their_sum(apart_s: float) -> None:
    """Sixteen jobs that take turns end one step, or one decode, apart."""
    throughput = Throughput()
    for number in range(16):
        found = throughput.add(100, start_s=0, end_s=160 + apart_s * number)
    assert found == pytest.approx(1600 / (160 + 15 * apart_s), rel=0.1)


def test_throughput_counts_short_jobs_beside_a_long_one() -> None:
    throughput = Throughput()
    for number in range(10):
        throughput.add(10, start_s=10 * number + 2, end_s=10 * number + 3)
    assert throughput.add(1000, start_s=0, end_s=100) == pytest.approx(1100 / 100, rel=0.01)
    throughput.add(10, start_s=198, end_s=199)
    assert throughput.add(1000, start_s=100, end_s=200) == pytest.approx(2110 / 200, rel=0.1)


def test_idle_time_does_not_lower_throughput() -> None:
    throughput = Throughput()
    throughput.add(100, start_s=0, end_s=10)
    assert throughput.add(100, start_s=1000, end_s=1010) == pytest.approx(10)


def test_a_slow_first_request_does_not_count_for_long() -> None:
    throughput = Throughput()
    throughput.add(100, start_s=0, end_s=1000)
    for number in range(40):
        found = throughput.add(100, start_s=1000 + number, end_s=1001 + number)
    assert found == pytest.approx(100)


def test_batches_of_concurrent_jobs_are_not_taken_for_slow() -> None:
    throughput = Throughput()
    for batch in range(4):
        for _ in range(16):
            found = throughput.add(100, start_s=160 * batch, end_s=160 * (batch + 1))
            assert batch < 2 or found == pytest.approx(10, rel=0.35)
    assert found == pytest.approx(10)


def test_old_measurements_count_little() -> None:
    throughput = Throughput()
    throughput.add(1e6, start_s=0, end_s=10)
    for number in range(100):
        found = throughput.add(100, start_s=100 + 60 * number, end_s=160 + 60 * number)
    assert found == pytest.approx(100 / 60, rel=0.1)
