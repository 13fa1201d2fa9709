"""Tries of a stage: which of them count, and how long the pauses are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from cluster.errors import GangLost, OutOfMemory, StageFailed
from deployments.director import retries
from deployments.director.retries import retry_stage
from deployments.messages import RequestContext, StageRetried
from tests.settling import run

DIED, AWAY = ActorDiedError(), ActorUnavailableError("connection refused", None)
LOST = GangLost("step", "a rank died")


async def call(failures: Iterable[Exception]) -> list[object]:
    """Run a stage that raises each failure in turn, then yields "done"; return the retries' numbers and "done"."""
    coming = iter(failures)

    async def attempt(context: RequestContext) -> AsyncIterator[str]:
        for failure in coming:
            raise failure
        yield "done"

    items = [item async for item in retry_stage("encode", RequestContext.new("r", 60.0), 3, attempt)]
    return [item.attempt if isinstance(item, StageRetried) else item for item in items]


@pytest.mark.parametrize("failures", [[DIED] * 2, [AWAY] * 20, [AWAY] * 20 + [DIED] * 2, [LOST] * 20])
def test_tries_that_reach_nobody_or_fail_by_others_do_not_count(failures: list[Exception]) -> None:
    assert run(call(failures)) == [*range(2, len(failures) + 2), "done"]


@pytest.mark.parametrize("failures", [[DIED] * 3, [DIED, AWAY, DIED, DIED]])
def test_deaths_count(failures: list[Exception]) -> None:
    with pytest.raises(StageFailed, match="'encode' failed 3 times; last: ActorDiedError"):
        run(call(failures))


@pytest.mark.parametrize("failure", [OutOfMemory("of 1 GiB"), MemoryError("of 1 GiB")])
def test_a_request_without_room_is_tried_once(failure: Exception) -> None:
    """Other processes of the stage have no more memory."""
    failures = iter([failure, DIED])
    with pytest.raises(OutOfMemory, match="of 1 GiB"):
        run(call(failures))
    assert list(failures) == [DIED]


def test_a_process_that_stays_away_counts_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_UNAVAILABLE_S", 0.1)
    with pytest.raises(StageFailed, match="last: ActorUnavailableError"):
        run(call([AWAY] * 100))


def test_pauses_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(retries.asyncio, "sleep", sleep)
    monkeypatch.setattr(retries, "_RETRY_PAUSE_S", 0.2)
    monkeypatch.setattr(retries, "_LONGEST_RETRY_PAUSE_S", 10.0)
    run(call([LOST] * 400))
    assert pauses[:4] == pytest.approx([0.2, 2.0, 10.0, 10.0])
    assert pauses[-1] == 10.0, "a request may lose its gang to others any number of times"
