"""Resources that a Director's pipelines share."""

from __future__ import annotations

from collections import Counter

from deployments.director import resources
from deployments.director.resources import ClipActors


def test_an_actor_for_clips_serves_a_thousand_and_the_next_is_started_before_its_end() -> None:
    started: list[object] = []

    def start() -> object:
        started.append(object())
        return started[-1]

    actors = ClipActors(start)
    per_actor, num_spare = resources._CLIPS_PER_ACTOR, resources._SPARE_CLIPS
    picked = [actors.pick() for _ in range(per_actor - num_spare)]
    assert len(started) == 1
    picked.append(actors.pick())
    assert len(started) == 2, "the next one comes up while this one still serves"
    picked += [actors.pick() for _ in range(2 * per_actor - len(picked))]
    assert Counter(map(id, picked)) == {id(actor): per_actor for actor in started[:2]}
    assert actors.current is started[1]
