"""StepScheduler on a fake clock: urgency, order within a class, ageing."""

from __future__ import annotations

from collections import Counter

from cluster.step_scheduler import AGEING_FLOOR_S, StepScheduler, Urgency


def test_an_empty_scheduler_gives_no_turn() -> None:
    turns: StepScheduler[str] = StepScheduler()
    assert turns.next(0.0) is None
    turns.add("a", Urgency.VIDEO, 0.0)
    turns.remove("a")
    turns.remove("a")
    assert turns.next(1.0) is None
    assert len(turns) == 0


def test_images_first_then_in_order_of_arrival() -> None:
    turns: StepScheduler[str] = StepScheduler()
    for job, urgency in (("v1", Urgency.VIDEO), ("v2", Urgency.VIDEO), ("i1", Urgency.IMAGE), ("i2", Urgency.IMAGE)):
        turns.add(job, urgency, 0.0)
    assert list(turns) == ["i1", "i2", "v1", "v2"]
    served = []
    while (job := turns.next(0.1)) is not None:
        served.append(job)
        turns.remove(job)
    assert served == ["i1", "i2", "v1", "v2"]


def test_a_request_keeps_its_turn_until_it_is_done() -> None:
    turns: StepScheduler[str] = StepScheduler()
    turns.add("v1", Urgency.VIDEO, 0.0)
    turns.add("v2", Urgency.VIDEO, 0.0)
    for now_s in range(100):
        assert turns.next(float(now_s)) == "v1"
        turns.record_turn(Urgency.VIDEO, now_s, now_s + 1.0)


def simulate(quantum_s: dict[Urgency, float], until_s: float) -> Counter[Urgency]:
    """Keep both classes busy; return the seconds that each got."""
    turns: StepScheduler[Urgency] = StepScheduler()
    for urgency in Urgency:
        turns.add(urgency, urgency, 0.0)
    now_s, got = 0.0, Counter[Urgency]()
    while now_s < until_s:
        job = turns.next(now_s)
        assert job is not None
        end_s = now_s + quantum_s[job]
        turns.record_turn(job, now_s, end_s)
        got[job] += end_s - now_s  # type: ignore[assignment]
        now_s = end_s
    return got


def test_videos_do_not_starve_however_many_images_come() -> None:
    got = simulate({Urgency.IMAGE: 0.25, Urgency.VIDEO: 0.25}, 100)
    assert 17 <= got[Urgency.VIDEO] <= 23, "a quarter second in every one and a quarter"


def test_slow_steps_of_a_video_do_not_take_over() -> None:
    got = simulate({Urgency.IMAGE: 0.25, Urgency.VIDEO: 3.0}, 300)
    assert 45 <= got[Urgency.VIDEO] <= 75, "about a fifth"


def test_an_image_that_comes_while_a_video_runs_is_next() -> None:
    turns: StepScheduler[str] = StepScheduler()
    turns.add("video", Urgency.VIDEO, 0.0)
    assert turns.next(50.0) == "video"
    turns.add("image", Urgency.IMAGE, 51.0)
    turns.record_turn(Urgency.VIDEO, 50.0, 60.0)
    assert turns.next(60.0) == "image"


def test_a_class_does_not_age_while_it_is_empty() -> None:
    turns: StepScheduler[str] = StepScheduler()
    turns.add("image", Urgency.IMAGE, 0.0)
    turns.add("video", Urgency.VIDEO, 100.0)
    assert turns.next(100.0 + AGEING_FLOOR_S / 2) == "image"
    assert turns.next(100.0 + AGEING_FLOOR_S) == "video"


def test_requests_that_end_with_their_turn_count_as_served() -> None:
    """Videos that end within one quantum must not leave their class aged."""
    turns: StepScheduler[str] = StepScheduler()
    turns.add("image", Urgency.IMAGE, 0.0)
    for index in range(100):
        turns.add(f"video {index}", Urgency.VIDEO, 0.0)
    now_s, served = 0.0, Counter[str]()
    while now_s < 20:
        job = turns.next(now_s)
        assert job is not None
        kind = job.split()[0]
        if kind == "video":
            turns.remove(job)
        turns.record_turn(Urgency.VIDEO if kind == "video" else Urgency.IMAGE, now_s, now_s + 0.25)
        served[kind] += 1
        now_s += 0.25
    assert 13 <= served["video"] <= 19, "a fifth of 80 turns"
