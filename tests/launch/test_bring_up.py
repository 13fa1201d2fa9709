"""Parts of the bring-up without Ray: an app's resources, one-line reasons, cleanup of processes."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import ray

from cosmos3_core.errors import CapabilityError
from deployments.api.auth import NoKeys
from deployments.config import DEFAULT_CONFIG, AppConfig
from deployments.jobs.database import database_url
from deployments.jobs.keys import KeyStore, NewKey
from deployments.launch import ray_session as ray_session_module
from deployments.launch.bring_up import RunningApp, StopTimeout, _check_access
from deployments.launch.capacity import Node, describe_missing, describe_shortfall, sum_needs
from deployments.launch.ray_session import (
    LostError,
    Placement,
    StartError,
    describe_failure,
    kill_leftovers,
    ray_session,
    time_limit,
)
from tests.settling import eventually


def config(checkpoint: Path, **overrides: object) -> AppConfig:
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return AppConfig.read(DEFAULT_CONFIG, {"checkpoint": str(checkpoint), **dotted})


@pytest.fixture(autouse=True)
def serve_log_level() -> Iterator[None]:
    """Restore the level of Serve's log, which a session of Ray raises."""
    logger = logging.getLogger("ray.serve")
    level = logger.level
    yield
    logger.setLevel(level)


def test_the_laptop_configuration_fits_two_cores(tiny_nano: Path) -> None:
    assert sum_needs(config(tiny_nano)) == pytest.approx({"CPU": 1.9, "GPU": 0})
    assert describe_missing(sum_needs(config(tiny_nano)), {"CPU": 2.0}) == ""


def test_replicas_gangs_and_autoscaling_are_counted(tiny_nano: Path) -> None:
    gangs = config(tiny_nano, transformer__num_replicas=3, transformer__gpus_per_rank=1)
    assert sum_needs(gangs) == pytest.approx({"CPU": 1.9 + 2 * 0.6, "GPU": 3})
    scaled = config(tiny_nano, vae__autoscaling={"min_replicas": 2, "max_replicas": 9}, vae__gpus_per_rank=0.5)
    assert sum_needs(scaled) == pytest.approx({"CPU": 2.3, "GPU": 1})


def test_an_audio_decoder_is_counted_if_configured(tiny_nano: Path, tiny_edge: Path) -> None:
    silent = config(tiny_nano, audio__enabled=False)
    assert sum_needs(silent) == pytest.approx({"CPU": 1.7, "GPU": 0})
    assert sum_needs(config(tiny_edge)) == sum_needs(silent)
    with pytest.raises(CapabilityError, match="makes no sound"):
        sum_needs(config(tiny_edge, audio__enabled=True))


def test_missing_resources_are_named_in_numbers() -> None:
    needs = {"CPU": 1.9, "GPU": 2.0}
    assert describe_missing(needs, {"CPU": 1.0}) == (
        "0.9 CPU and 2 GPU missing: the app needs 1.9 CPU and 2 GPU, Ray has 1 CPU and 0 GPU for it."
    )
    # Ray counts in ten-thousandths; sums of tenths are not exact.
    assert describe_missing({"CPU": 0.1 + 0.2, "GPU": 0.0}, {"CPU": 0.3}) == ""


def node(gpus: float, **labels: str) -> Node:
    return Node({"CPU": 16.0, "GPU": gpus, "memory": 1e9}, labels)


def test_more_ranks_than_gpus_names_layouts_that_fit(tiny_nano: Path) -> None:
    eight = config(tiny_nano, transformer__tp=4, transformer__cfg=2, transformer__gpus_per_rank=1)
    largest = (
        "--tp 1 --cfg 2 --sp 2 --gangs 1, or --tp 1 --cfg 1 --sp 4 --gangs 1, or --tp 2 --cfg 2 --sp 1 --gangs 1, or "
        "--tp 2 --cfg 1 --sp 2 --gangs 1."
    )
    assert describe_shortfall(eight, [node(4)]) == (
        f"4 GPU missing: the app needs 5.4 CPU and 8 GPU, Ray has 16 CPU and 4 GPU for it. What fits: {largest}"
    )
    assert describe_shortfall(eight, [node(4), node(4)]) == (
        "placement_strategy STRICT_PACK wants all 8 ranks of a gang on one node, and none has 4.1 CPU and 8 GPU; "
        f"PACK takes several nodes. What fits: {largest}"
    )
    two_gangs = config(tiny_nano, transformer__cfg=2, transformer__num_replicas=2, transformer__gpus_per_rank=1)
    assert describe_shortfall(two_gangs, [node(2)]).endswith("What fits: --tp 1 --cfg 1 --sp 1 --gangs 2.")
    assert describe_shortfall(two_gangs, [node(1)]).endswith("What fits: --tp 1 --cfg 1 --sp 1 --gangs 1.")
    assert describe_shortfall(two_gangs, [node(0)]).endswith("Ray has 16 CPU and 0 GPU for it.")
    assert describe_shortfall(two_gangs, [node(4)]) == ""
    scaled = config(
        tiny_nano, transformer__autoscaling={"min_replicas": 2, "max_replicas": 2}, transformer__gpus_per_rank=1
    )
    assert describe_shortfall(scaled, [node(1)]).endswith("--sp 1 --set transformer.autoscaling.min_replicas=1.")


def test_a_share_must_fit_one_card(tiny_nano: Path) -> None:
    five = config(tiny_nano, transformer__sp=5, transformer__gpus_per_rank=0.8)
    fits = "What fits: --tp 1 --cfg 2 --sp 2 --gangs 1, "
    assert describe_shortfall(five, [node(4)]).startswith(
        f"5 ranks of 0.8 GPU each need 5 cards, and there are 4. {fits}"
    )
    assert "on one node, and none has 2.6 CPU and 5 GPU" in describe_shortfall(five, [node(4), node(4)])
    assert describe_shortfall(five, [node(5)]) == ""
    halves = config(tiny_nano, transformer__sp=5, transformer__gpus_per_rank=0.5)
    assert describe_shortfall(halves, [node(3)]) == ""


def test_strategies_and_labels_want_nodes_that_fit(tiny_nano: Path) -> None:
    def pair(strategy: str, **more: object) -> AppConfig:
        gang = {"transformer__cfg": 2, "transformer__gpus_per_rank": 1, "transformer__placement_strategy": strategy}
        return config(tiny_nano, **gang, **more)

    assert describe_shortfall(pair("PACK"), [node(1), node(1)]) == ""
    assert describe_shortfall(pair("STRICT_SPREAD"), [node(1), node(1)]) == ""
    assert describe_shortfall(pair("STRICT_SPREAD"), [node(2), node(0)]) == (
        "placement_strategy STRICT_SPREAD wants 2 nodes with 0.5 CPU and 1 GPU for a rank, one with "
        "0.6 CPU and 1 GPU for the leader too; there are 1. What fits: --tp 1 --cfg 1 --sp 1 --gangs 1."
    )
    slivers = [Node({"CPU": 0.3, "GPU": 1.0}, {})] * 10
    assert describe_shortfall(pair("SPREAD"), slivers).startswith("placement_strategy SPREAD wants 1 nodes with")

    here, there = node(2, gpu="H200"), node(2, gpu="H100")
    for selector, is_held in (("H200", True), ("!H200", True), ("in(H100,H200)", True), ("!in(H100,H200)", False)):
        asking = pair("STRICT_PACK", transformer__node_labels={"gpu": selector})
        assert (describe_shortfall(asking, [here, there]) == "") == is_held, selector
    assert describe_shortfall(pair("PACK", vae__node_labels={"gpu": "B200", "zone": "!a"}), [here]) == (
        "No node has the labels that vae.node_labels asks for (gpu: B200, zone: !a)."
    )
    assert describe_shortfall(pair("PACK", vae__node_labels={"zone": "!a"}), [here]) == "", (
        "no label is unequal to a label"
    )
    # Enough in total, but not on the labelled nodes.
    small = [node(1, gpu="H200"), node(8, gpu="H100")]
    assert "on one node" in describe_shortfall(pair("STRICT_PACK", transformer__node_labels={"gpu": "H200"}), small)


def test_a_reason_is_the_last_line_of_the_innermost_traceback() -> None:
    text = (
        "The deployment failed to start 3 times in a row. Error:\n\x1b[36mray::Replica.init()\x1b[39m (pid=1)\n"
        "RuntimeError: Traceback (most recent call last):\n  File 'a.py', line 1\n"
        "ray.exceptions.RayTaskError(CorruptFileError): \x1b[36mray::Rank.load()\x1b[39m (pid=2)\n"
        "cosmos3_core.errors.CorruptFileError: /tmp/a: truncated:\n  1000 bytes."
    )
    assert describe_failure(text) == "CorruptFileError: /tmp/a: truncated: 1000 bytes."
    assert describe_failure(ValueError("plain\nand simple")) == "plain and simple"
    assert len(describe_failure("x" * 10_000)) < 1000


def test_a_call_that_hangs_is_given_up() -> None:
    start_s = time.monotonic()
    with pytest.raises(LostError, match="has not answered for 0.2 s"), time_limit(0.2):
        time.sleep(60)
    assert time.monotonic() - start_s < 10
    with time_limit(60):
        pass
    with pytest.raises(KeyboardInterrupt), time_limit(60):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("host", "enabled", "needs_key"),
    [
        ("127.0.0.1", None, False),
        ("localhost", None, False),
        ("::1", None, False),
        ("127.0.0.1", True, True),
        ("0.0.0.0", None, True),
        ("::", None, True),
        ("10.0.0.5", None, True),
        ("my-host", None, True),
        ("10.0.0.5", True, True),
        ("0.0.0.0", False, False),
    ],
)
def test_an_app_beyond_loopback_without_keys_is_refused(
    host: str, enabled: bool | None, needs_key: bool, tiny_nano: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    asked = config(tiny_nano, http__host=host, auth__enabled=enabled, media__directory=str(tmp_path))
    if not needs_key:
        _check_access(asked, lines.append)
        warning = f"auth.enabled is false and http.host is {host}: everyone who reaches the port may use the app"
        assert lines == [warning] * (enabled is False), "it is said where it is not the default"
        assert list(tmp_path.iterdir()) == [], "no database is needed to tell"
        return
    with pytest.raises(NoKeys, match=f"http.host={host}, and there is none"):
        _check_access(asked, lines.append)
    keys = KeyStore.open(database_url(asked))
    key, _ = keys.create(NewKey(name="a"))
    _check_access(asked, lines.append)
    keys.revoke(key.key_id)
    keys.close()
    with pytest.raises(NoKeys):
        _check_access(asked, lines.append)
    assert lines == []


def test_no_process_outlives_the_block(tmp_path: Path) -> None:
    """An orphan in its own session ends as well."""
    pid_file = tmp_path / "pid"
    child = (
        "import os, subprocess, sys\n"
        "sleeper = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        f"open({str(pid_file)!r}, 'w').write(str(sleeper.pid))"
    )
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        with kill_leftovers(os.environ):
            subprocess.run([sys.executable, "-c", child], check=True, timeout=60)
            pid = int(pid_file.read_text())
            assert is_running(pid)
        # A process that is ending has no environment by which to find it: it may be there a moment longer.
        assert eventually(lambda: not is_running(pid))
        assert bystander.poll() is None
        assert not [name for name in os.environ if name.startswith("COSMOS3_STARTED")]
    finally:
        bystander.kill()
        bystander.wait()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# A mutex that is locked twice ignores signals, like Ray's native code.
HANGING = """
import ctypes, os, signal, subprocess, sys
from deployments.launch.ray_session import end_on_signals, kill_leftovers
native = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(64)
signal.signal(signal.SIGTERM, signal.default_int_handler)
with kill_leftovers(os.environ), end_on_signals({signal.SIGTERM}, 0.2):
    child = subprocess.Popen(["sleep", "600"])
    native.pthread_mutex_lock(mutex)
    try:
        print(child.pid, flush=True)
        native.pthread_mutex_lock(mutex)
    except KeyboardInterrupt:  # the signal was there first
        native.pthread_mutex_lock(mutex)
"""


def test_a_signal_ends_what_hangs_in_native_code() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HANGING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            child = int(process.stdout.readline())
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 130
            assert process.stderr.read() == "interrupted\n"
            assert eventually(lambda: not is_running(child))
        finally:
            process.kill()


def test_a_signal_handled_in_time_is_left_to_the_program() -> None:
    program = (
        "import os, signal, time\n"
        "from deployments.launch.ray_session import end_on_signals\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "try:\n"
        "    with end_on_signals({signal.SIGTERM}, 60):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    print('left', signal.set_wakeup_fd(-1))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left -1\n", "")


class LateError(Exception):
    """Formatted when Ray has given up; only then is the signal handled."""

    def __str__(self) -> str:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return "late"


@pytest.mark.parametrize("moment", ["Ray starts", "Ray has given up", "Ray has started"])
def test_sigterm_is_ctrl_c_at_every_moment_of_rays_start(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own handler raises `SystemExit`, which would end the command without a message."""

    def terminate() -> None:
        signal.raise_signal(signal.SIGTERM)  # to this thread: another one would tell Python a moment later

    def init(**options: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray does
        if moment == "Ray has given up":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            terminate()
            raise LateError
        if moment == "Ray starts":
            terminate()

    @contextmanager
    def terminate_inside(*arguments: object) -> Iterator[None]:
        yield
        terminate()

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    if moment == "Ray has started":
        monkeypatch.setattr("deployments.launch.ray_session.end_on_signals", terminate_inside)
    with pytest.raises(KeyboardInterrupt), ray_session(Placement()):
        pytest.fail("started")
    assert signal.getsignal(signal.SIGTERM) == before


class Scripted(RunningApp):
    """An app with a scripted number of running requests per look; None is Ctrl-C."""

    asked: list[str]
    left: Iterator[int | None]

    def _broadcast(self, stage: str, method: str) -> list[int]:
        self.asked.append(f"{stage}.{method}")
        if (stage, method) != ("Director", "drain"):
            return [0]
        left = next(self.left)
        if left is None:
            raise KeyboardInterrupt
        return [left]


@pytest.mark.parametrize(
    ("left", "timeout_s", "is_released", "said"),
    [
        ((2, 0), 60.0, False, []),
        ((2, 2, 1, 0), 60.0, False, ["finishing running requests, for 60 s at most"]),
        ((2, 2, None), 60.0, True, ["finishing running requests, for 60 s at most"]),
        ((2, 2), 0.0, True, ["2 requests are not done after 0 s"]),
    ],
    ids=["idle", "in time", "interrupted", "too long"],
)
def test_unfinished_jobs_are_released(
    left: Sequence[int | None], timeout_s: float, is_released: bool, said: list[str]
) -> None:
    app = Scripted("cosmos3", "http://127.0.0.1:8000", "127.0.0.1:6379", 0.0, StopTimeout())
    app.asked, app.left = [], iter(left)
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt) if None in left else nullcontext():
        app.drain(timeout_s, lines.append)
    assert app.asked[:2] == ["Director.drain", "Ingress.drain"], "what /ready says is so"
    assert (app.asked[-1] == "Director.release") is is_released
    assert [line.split(";")[0] for line in lines] == said


def test_a_failed_start_of_ray_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises a bare Exception if its daemon takes longer than half a minute."""
    starts: list[object] = []

    def late(**options: object) -> None:
        starts.append(options)
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", late)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # the running one is the other tests'
    expected = "Ray did not start: The current node timed out during startup. Is the machine .* logs are below "
    with pytest.raises(StartError, match=expected), ray_session(Placement()):
        pass
    assert len(starts) == 2
    with pytest.raises(StartError, match="cannot join"), ray_session(Placement("auto")):
        pass
    assert len(starts) == 3, "another's Ray is not started"


def test_a_late_start_of_ray_is_tried_again_without_what_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(**_: object) -> None:
        started.append(subprocess.Popen(["sleep", "1000"]))
        if len(started) == 1:
            raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", start)
    with kill_leftovers(os.environ):
        ray_session_module._init(Placement())
        assert started[0].wait(20) == -signal.SIGKILL
        assert started[1].poll() is None
    assert started[1].wait(20) == -signal.SIGKILL
