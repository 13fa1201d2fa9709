"""Gangs of several ranks in the whole graph: equal frames, common failure, resuming, refused layouts."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.events import QueuePosition, StepDone
from cosmos3_core.errors import RequestError
from cosmos3_core.generate import GenerationResult
from cosmos3_core.media.probe import read_frames
from cosmos3_core.request import GenerationRequest
from deployments import messages
from deployments.launch.app_calls import save_video
from tests.settling import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.serve, pytest.mark.gang, pytest.mark.timeout(900)]

SMALL = GenerationRequest(prompt="A red car.", num_frames=9, height=80, width=96, num_inference_steps=6, seed=5)
LONG = replace(SMALL, num_inference_steps=80)
IMAGE = replace(SMALL, num_frames=1)
DEADLINE_S = 300.0
Reference = Callable[[GenerationRequest], GenerationResult]


@pytest.fixture(scope="module")
def gang_app(start_app: Callable[..., Any]) -> Any:
    """An app with four denoising ranks, two Directors, two pairs of decoding ranks and two encoders."""
    return start_app(
        "gang",
        audio__enabled=False,
        director__num_replicas=2,
        encoder__num_replicas=2,
        jobs__max_running_videos=32,
        transformer__tp=2,
        transformer__cfg=2,
        transformer__save_period_s=0.25,
        transformer__quantum_timeout_s=10,
        transformer__max_jobs=3,
        vae__num_replicas=2,
        vae__ranks=2,
    )


@pytest.fixture(scope="module")
def undisturbed(gang_app: Any) -> str:
    """The frames of the long request on this layout, without a death."""
    return str(gang_app.client.generate(LONG, timeout_s=DEADLINE_S).info.frames_sha256)


def one(kind: type, events: list[Any]) -> Any:
    (event,) = (event for event in events if isinstance(event, kind))
    return event


def all_of(kind: type, events: list[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def ranks_of(app: Any) -> tuple[int, ...]:
    pids: tuple[int, ...] = one(messages.LatentsReady, list(app.client.stream(SMALL, timeout_s=DEADLINE_S))).rank_pids
    return pids


def exists(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def rank_processes(raylet: int) -> set[int]:
    """List this raylet's children with the title of a transformer rank; other tests may have their own Ray."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::TransformerRank") and parent_of(int(path.parent.name)) == raylet:
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


def follow_disturbed(app: Any, disturb: Callable[[], None]) -> list[Any]:
    """Follow the long request; disturb it once its first state is saved."""
    events = []
    for event in app.client.stream(LONG, timeout_s=DEADLINE_S):
        events.append(event)
        if isinstance(event, messages.StateSaved) and disturb is not None:
            disturb()
            disturb = None  # type: ignore[assignment]
    return events


def test_a_gang_of_four_equals_one_rank(gang_app: Any, reference: Reference, tmp_path: Any) -> None:
    # Lossless: how x264 encodes a difference of one level depends on the processor too.
    exact = replace(SMALL, lossless=True)
    alone = reference(exact)
    assert alone.path is not None
    (tmp_path / "clip.mp4").write_bytes(gang_app.client.generate(exact).media)
    generated = gang_app.client.generate(SMALL)
    ours, theirs = (np.stack(list(read_frames(path))).astype(int) for path in (tmp_path / "clip.mp4", alone.path))
    # TP rounds otherwise: a pixel here and there is one level off before the encoder.
    assert np.abs(ours - theirs).mean() < 0.1
    assert gang_app.client.generate(SMALL).media == generated.media, "the same layout twice"
    unguided = replace(SMALL, guidance_scale=1.0)
    assert gang_app.client.generate(unguided).info.num_frames == 9
    over_http = save_video(gang_app.url, SMALL, tmp_path / "http", timeout_s=DEADLINE_S)
    assert over_http.path.read_bytes() == generated.media


def test_a_ranks_death_ends_its_gang_and_the_next_gang_resumes_from_the_saved_state(
    gang_app: Any, undisturbed: str
) -> None:
    before = ranks_of(gang_app)
    assert len(set(before)) == 4
    events = follow_disturbed(gang_app, lambda: os.kill(before[3], signal.SIGKILL))
    retried = one(messages.StageRetried, events)
    assert retried.stage == "denoise"
    assert "rank 3: died" in retried.reason
    saved = [event.step for event in all_of(messages.StateSaved, events[: events.index(retried)])]
    assert retried.from_step == saved[-1] > 0
    # Exactly the steps after the saved state run again, in order.
    again = [event.step for event in all_of(StepDone, events[events.index(retried) :])]
    assert again == list(range(saved[-1] + 1, LONG.num_inference_steps + 1))
    assert one(messages.Finished, events).frames_sha256 == undisturbed
    assert not set(before) & set(one(messages.LatentsReady, events).rank_pids)
    assert eventually(lambda: not any(map(exists, before)))


@pytest.mark.slow  # a gang has to come up again
def test_a_leaders_death_ends_its_ranks_and_placement_group(gang_app: Any, undisturbed: str) -> None:
    from ray.util.placement_group import placement_group_table

    def num_groups() -> int:
        return [group["state"] for group in placement_group_table().values()].count("CREATED")

    known = one(messages.LatentsReady, list(gang_app.client.stream(SMALL, timeout_s=DEADLINE_S)))
    groups_before = num_groups()
    events = follow_disturbed(gang_app, lambda: os.kill(known.pid, signal.SIGKILL))
    retried = one(messages.StageRetried, events)
    again = [event.step for event in all_of(StepDone, events[events.index(retried) :])]
    assert retried.from_step > 0
    assert again == list(range(retried.from_step + 1, LONG.num_inference_steps + 1))
    assert one(messages.Finished, events).frames_sha256 == undisturbed
    assert eventually(lambda: not any(map(exists, (known.pid, *known.rank_pids))))
    assert eventually(lambda: num_groups() == groups_before)


@pytest.mark.slow  # a gang has to come up again
def test_a_hanging_rank_meets_the_leaders_deadline(gang_app: Any, undisturbed: str) -> None:
    before = ranks_of(gang_app)
    events = follow_disturbed(gang_app, lambda: os.kill(before[2], signal.SIGSTOP))
    retried = one(messages.StageRetried, events)
    assert "no answer from" in retried.reason
    assert retried.from_step > 0
    assert one(messages.Finished, events).frames_sha256 == undisturbed
    assert eventually(lambda: not any(map(exists, before))), "stopped as it is, it ends with the others"


@pytest.mark.slow  # a gang has to come up again
def test_a_rank_that_dies_while_idle_is_noticed_before_the_next_request(gang_app: Any) -> None:
    before = ranks_of(gang_app)
    os.kill(before[1], signal.SIGKILL)
    assert eventually(lambda: not any(map(exists, before)), DEADLINE_S)
    events = list(gang_app.client.stream(SMALL, timeout_s=DEADLINE_S))
    assert not set(before) & set(one(messages.LatentsReady, events).rank_pids)


@pytest.mark.slow  # a gang has to come up again
def test_a_rank_killed_during_bring_up_restarts_the_gang(gang_app: Any) -> None:
    before = ranks_of(gang_app)
    raylet = parent_of(before[0])
    others = rank_processes(raylet) - set(before)
    os.kill(before[0], signal.SIGKILL)
    newcomers: set[int] = set()

    def has_new_rank() -> bool:
        newcomers.update(rank_processes(raylet) - others - set(before))
        return bool(newcomers)

    assert eventually(has_new_rank, DEADLINE_S)
    victim = newcomers.pop()
    os.kill(victim, signal.SIGKILL)
    assert victim not in ranks_of(gang_app)
    assert eventually(lambda: len(rank_processes(raylet) - others) == 4, DEADLINE_S), "nothing is left of the failed"


def test_an_image_overtakes_queued_videos(gang_app: Any, undisturbed: str) -> None:
    """Three videos fill the gang, eight more wait; the image runs before any of them is done."""
    expected = gang_app.client.generate(IMAGE, timeout_s=DEADLINE_S).info.frames_sha256
    streams = [gang_app.client.stream(LONG, timeout_s=DEADLINE_S) for _ in range(11)]
    seen: list[list[Any]] = [[] for _ in streams]

    def follow(index: int) -> None:
        for event in streams[index]:
            seen[index].append(event)

    def num_seen(kind: type) -> int:
        return sum(any(isinstance(event, kind) for event in events) for events in seen)

    with ThreadPoolExecutor(len(streams)) as pool:
        futures = [pool.submit(follow, index) for index in range(len(streams))]
        try:
            assert eventually(lambda: num_seen(StepDone) > 0, DEADLINE_S)
            rank_pid = next(event.pid for events in seen for event in events if isinstance(event, StepDone))
            os.kill(rank_pid, signal.SIGSTOP)
            try:
                assert eventually(lambda: num_seen(QueuePosition) >= 3, DEADLINE_S)
                assert eventually(lambda: num_seen(messages.Tokenized) == len(streams), DEADLINE_S)
                image = gang_app.client.stream(IMAGE, timeout_s=DEADLINE_S)
                events = [next(event for event in image if isinstance(event, QueuePosition))]
            finally:
                os.kill(rank_pid, signal.SIGCONT)
            events += image
            assert num_seen(messages.LatentsReady) == 0, "no video was done before the image"
            assert all_of(QueuePosition, events)[0].position == 0
            assert one(messages.Finished, events).frames_sha256 == expected
            assert eventually(lambda: num_seen(messages.Finished) > 0, DEADLINE_S)
        finally:
            for stream in streams:
                stream.close()
        for future in futures:
            future.exception(timeout=DEADLINE_S)
    finished = [event for events in seen for event in events if isinstance(event, messages.Finished)]
    assert {event.frames_sha256 for event in finished} == {undisturbed}, "passed over, and none the worse"


def test_clips_do_not_mix_and_each_stays_with_one_encoder(gang_app: Any) -> None:
    """Two encoders, two decoders, two Directors, six clips at once."""
    requests = [replace(SMALL, num_frames=17, seed=seed) for seed in range(6)]

    def run(request: GenerationRequest) -> tuple[str, set[int]]:
        events = list(gang_app.client.stream(request, timeout_s=200))
        encoders = {event.pid for event in all_of(messages.ChunkEncoded, events)}
        return one(messages.Finished, events).frames_sha256, encoders

    expected = [run(request)[0] for request in requests]
    assert len(set(expected)) == len(expected)
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(run, requests))
    assert [digest for digest, _ in results] == expected
    assert all(len(encoders) == 1 for _, encoders in results)
    # More clips than places, and independent Directors: a clip that held an encoder's place and
    # waited for a decoder's, which another one held and waited for an encoder, would wait for ever.
    with ThreadPoolExecutor(12) as pool:
        many = list(pool.map(run, requests * 2))
    assert [digest for digest, _ in many] == expected * 2
    assert len(set.union(*(encoders for _, encoders in results))) == 2, "both encoders had work"


@pytest.mark.slow  # four more ranks
def test_two_gangs_of_one_host_serve_side_by_side(start_app: Callable[..., Any]) -> None:
    from ray import serve

    app = start_app("two-gangs", transformer__tp=2, transformer__num_replicas=2)

    def find_server() -> tuple[tuple[int, ...], str]:
        with app.client.stream(SMALL, timeout_s=200) as events:
            seen = list(events)
        (ready,) = (event for event in seen if isinstance(event, messages.LatentsReady))
        (finished,) = (event for event in seen if isinstance(event, messages.Finished))
        assert not [event for event in seen if isinstance(event, messages.StageRetried)]
        return ready.rank_pids, finished.frames_sha256

    with ThreadPoolExecutor(6) as callers:
        served = list(callers.map(lambda _: find_server(), range(12)))
    gangs = {ranks for ranks, _ in served}
    assert len(gangs) == 2, "both gangs get requests"
    assert len({pid for ranks in gangs for pid in ranks}) == 4, "and share no rank"
    assert len({frames for _, frames in served}) == 1
    serve.delete("two-gangs")


@pytest.mark.slow  # three more ranks
def test_unguided_requests_have_their_own_gangs(start_app: Callable[..., Any], reference: Reference) -> None:
    app = start_app("two kinds", transformer__cfg=2, unguided={"cpus_per_rank": 0.5, "dtype": "float32"})
    unguided = replace(SMALL, guidance_scale=1.0)
    ranks = {}
    for request in (SMALL, unguided, SMALL, unguided):
        events = list(app.client.stream(request, timeout_s=DEADLINE_S))
        ranks.setdefault(request.guidance_scale, []).append(one(messages.LatentsReady, events).rank_pids)
        assert one(messages.Finished, events).frames_sha256 == reference(request).frames_sha256
    assert [len(pids) for pids in ranks[SMALL.guidance_scale]] == [2, 2]
    assert [len(pids) for pids in ranks[1.0]] == [1, 1]


@pytest.mark.parametrize(
    ("degrees", "said"), [({"tp": 3}, "one of 1, 2, 4 for this checkpoint"), ({"tp": 16}, "one of 1, 2, 4")]
)
def test_bad_layouts_are_refused_before_anything_is_placed(
    degrees: dict[str, int], said: str, start_app: Callable[..., Any]
) -> None:
    with pytest.raises(RequestError, match=said):
        start_app("refused", **{f"transformer__{axis}": degree for axis, degree in degrees.items()})
