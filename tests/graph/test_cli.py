"""The real command in processes of its own, with its own Ray instead of the one that this folder's tests share.

The first tests share one app; the last one of them stops it.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from cluster.errors import ShuttingDown
from cosmos3_core.media.image import write_image
from cosmos3_core.media.probe import probe_video
from cosmos3_core.request import GenerationRequest
from deployments.launch.app_calls import get, save_video
from tests.graph.serving import DEADLINE_S, REPOSITORY, Serving, cosmos3, serving
from tests.graph.sockets import list_listening

pytestmark = [pytest.mark.serve, pytest.mark.timeout(900)]

REQUEST = [
    *("--prompt", "A red car.", "--num-frames", "9", "--height", "64", "--width", "96"),
    *("--steps", "3", "--seed", "5"),
]


def only_line(text: str) -> str:
    (line,) = text.splitlines()
    return line


@pytest.fixture(scope="module")
def served(tiny_nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("serve"), "--checkpoint", str(tiny_nano)) as started:
        started.url()
        yield started


def test_a_request_over_http_gives_the_file_of_a_request_in_process(
    served: Serving, tiny_nano: Path, tmp_path: Path
) -> None:
    over_http = cosmos3("generate", "--url", served.url(), *REQUEST, "--out", "http", cwd=tmp_path)
    assert over_http.returncode == 0, over_http.stderr
    assert re.search(r"^http\.mp4: \d+ bytes, seed 5, negative prompt: built-in$", over_http.stdout, re.MULTILINE)
    for stage in ("tokenize", "denoise", "decode_encode", "encode", "total"):
        assert re.search(rf"^  {stage} +[\d.]+ s$", over_http.stdout, re.MULTILINE), over_http.stdout

    device = ("--checkpoint", str(tiny_nano), "--device", "cpu")
    in_process = cosmos3("generate", *device, *REQUEST, "--out", "here", cwd=tmp_path)
    assert in_process.returncode == 0, in_process.stderr
    assert (tmp_path / "http.mp4").read_bytes() == (tmp_path / "here.mp4").read_bytes()
    assert probe_video(tmp_path / "http.mp4").num_frames == 9


def test_the_command_saves_an_image_and_prints_a_note(served: Serving, tmp_path: Path) -> None:
    small = ("--prompt", "A red car.", "--height", "64", "--width", "64", "--steps", "2")
    image = cosmos3("generate", "--url", served.url(), *small, "--num-frames", "1", "--out", "image", cwd=tmp_path)
    assert image.stdout.startswith("image.png: "), image.stderr
    rounded = cosmos3("generate", "--url", served.url(), *small, "--num-frames", "6", "--out", "clip", cwd=tmp_path)
    assert rounded.stdout.startswith("clip.mp4: "), rounded.stderr
    assert rounded.stderr == "note: num_frames=6 was rounded up to 9: clips have 1 + k * 4 frames\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "image.png"]


def test_images_and_actions_over_http_equal_one_process(served: Serving, tiny_nano: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "arm.png", np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8), "png")
    policy = ("--mode", "policy", "--prompt", "Pick it up.", "--domain-name", "bridge_orig_lerobot", "--steps", "2")
    policy = (*policy, "--image", "arm.png", "--action-chunk-size", "4", "--resolution-tier", "256")
    over_http = cosmos3("generate", "--url", served.url(), *policy, "--out", "http", cwd=tmp_path)
    assert over_http.returncode == 0, over_http.stderr
    assert re.search(r"^http\.mp4: \d+ bytes, seed 42", over_http.stdout, re.MULTILINE), over_http.stdout
    assert re.search(r"^http\.actions\.json: actions, seed 42", over_http.stdout, re.MULTILINE), over_http.stdout
    device = ("--checkpoint", str(tiny_nano), "--device", "cpu")
    in_process = cosmos3("generate", *device, *policy, "--out", "here", cwd=tmp_path)
    assert in_process.returncode == 0, in_process.stderr
    for suffix in ("mp4", "actions.json"):
        assert (tmp_path / f"http.{suffix}").read_bytes() == (tmp_path / f"here.{suffix}").read_bytes()
    found = ("--mode", "inverse_dynamics", "--video", "http.mp4", "--domain-name", "bridge_orig_lerobot")
    found = (*found, "--action-chunk-size", "4", "--resolution-tier", "256", "--steps", "2", "--out", "found")
    alone = cosmos3("generate", "--url", served.url(), *found, cwd=tmp_path)
    assert alone.stdout.startswith("found.actions.json: actions, "), alone.stderr
    assert not (tmp_path / "found.mp4").exists()
    missing = cosmos3("generate", "--url", served.url(), *policy, "--image", "none.png", cwd=tmp_path)
    assert missing.returncode == 2
    assert "image must be the path of a file that can be read (got 'none.png')" in only_line(missing.stderr)


def test_what_listens_is_on_loopback_or_asks_for_rays_token(served: Serving) -> None:
    """Serve binds its servers between replicas to all interfaces and cannot be told otherwise."""
    commands = served.leftovers()
    sockets = list_listening(commands)
    assert {commands[pid] for address, pid in sockets.items() if "gcs_server" in commands[pid]}, "they are found"
    open_to_all = [address for address in sockets if not ipaddress.ip_address(address.rpartition(":")[0]).is_loopback]
    for address in open_to_all:
        assert "ray::ServeReplica" in commands[sockets[address]], address
        with grpc.insecure_channel(f"127.0.0.1:{address.rpartition(':')[2]}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", timeout=60)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--height", "100"], "error: height must be a multiple of 16 (got 100); use 96 or 112"),
        (["--out", "no/such/folder/clip"], "must be a path in an existing directory (got "),
        (["--dtype", "bfloat16"], "error: dtype must be only without --url (got 'bfloat16')"),
        (["--tp", "2"], "error: tp must be only without --url (got 2)"),
    ],
)
def test_a_refusal_is_one_line(arguments: list[str], said: str, served: Serving, tmp_path: Path) -> None:
    done = cosmos3("generate", "--url", served.url(), *REQUEST, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert said in only_line(done.stderr)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_check_goes_through_every_stage(served: Serving, tmp_path: Path) -> None:
    done = cosmos3("check", "--url", served.url(), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^(.*?)\s+(ok|FAIL)\b", done.stdout, re.MULTILINE) == [
        (stage, "ok") for stage in ("ready", "tokenize", "condition", "denoise", "decode + encode", "file")
    ]
    assert "5 frames, 96x64, 24 fps with sound" in done.stdout


def test_the_example_that_serve_prints_works(served: Serving, tmp_path: Path) -> None:
    curl = re.search(r"curl .*\n.*", served.said())
    assert curl is not None
    body = re.search(r"-d '(.*)'", curl[0])
    assert body is not None
    assert json.loads(body[1])["prompt"]
    if shutil.which("curl"):
        subprocess.run(["bash", "-c", curl[0]], cwd=tmp_path, check=True, capture_output=True, timeout=DEADLINE_S)
        assert probe_video(tmp_path / "first.mp4").num_frames == 17


FOLLOW = """
from cosmos3_core import GenerationRequest
from deployments.client import connect
request = GenerationRequest(prompt="x", num_frames=17, height=96, width=96, num_inference_steps=1000)
for event in connect().stream(request):
    print(type(event).__name__, flush=True)
"""


def test_ctrl_c_drains_running_jobs_and_leaves_no_process(served: Serving, tmp_path: Path) -> None:
    url = served.url()
    assert len(served.leftovers()) > 8, "the mark is not inherited"
    command = [sys.executable, "-c", FOLLOW]
    with subprocess.Popen(
        command, env=served.client_environment(), cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdout is not None
        assert "StepDone\n" in client.stdout
        # As a terminal sends Ctrl-C.
        os.killpg(served.process.pid, signal.SIGINT)
        deadline_s = time.monotonic() + DEADLINE_S
        while "shutting down" not in get(url, "/ready", timeout_s=60)[1]:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        # Sent from here: another command's start may outlast the running request.
        with pytest.raises(ShuttingDown, match="the app is being stopped and takes no new request"):
            save_video(url, GenerationRequest(prompt="x", num_frames=5), tmp_path / "late.mp4", timeout_s=60)
        assert client.stdout.read().splitlines()[-2:] == ["ChunkEncoded", "VideoEnded"]
    assert client.returncode == 0
    assert served.process.wait(DEADLINE_S) == 0, served.said()
    *_, stopping, finishing, job, stopped = served.said().splitlines()
    assert (stopping, stopped) == ("stopping ...", "stopped")
    assert finishing == "finishing running requests, for 120 s at most; a second Ctrl-C leaves jobs to the next start"
    assert re.fullmatch(r"[\d:]{8} video_gen_\w+ text_to_video \d+x\d+ \d+ frames 1000 steps: completed in .* s", job)
    assert served.leftovers() == {}
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect((host, int(port)))

    refused = cosmos3("check", "--url", url, cwd=REPOSITORY)
    assert refused.returncode == 1
    assert re.fullmatch(r"ready +FAIL +http://\S+: nothing listens there; .*", only_line(refused.stdout))


@pytest.mark.parametrize("group", [False, True], ids=["to the command", "to its whole group"])
def test_a_signal_during_the_start_leaves_no_process(group: bool, tiny_nano: Path, tmp_path: Path) -> None:
    with serving(tmp_path, "--checkpoint", str(tiny_nano)) as started:
        deadline_s = time.monotonic() + DEADLINE_S
        while len(started.leftovers()) < 2 and time.monotonic() < deadline_s:  # the first process of Ray appears
            time.sleep(0.05)
        (os.killpg if group else os.kill)(started.process.pid, signal.SIGTERM)
        assert started.process.wait(DEADLINE_S) == 130, started.said()
        assert started.said().splitlines()[-1] == "interrupted"
        assert started.leftovers() == {}


@pytest.mark.slow  # Serve tries three times; tests/checkpoint shows the words
def test_a_damaged_tokenizer_is_named_in_one_line(tiny_nano: Path, tmp_path: Path) -> None:
    """Found by a replica: Ray's tracebacks stay out of it. Weights are checked before Ray starts."""
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_nano, damaged)
    (damaged / "text_tokenizer" / "tokenizer.json").write_text("{")
    with serving(tmp_path, "--checkpoint", str(damaged)) as started:
        assert started.process.wait(DEADLINE_S) == 2, started.said()
        first, last = started.said().splitlines()
        assert first.startswith("starting cosmos3 with ")
        found = f"{damaged / 'text_tokenizer'}: not a readable tokenizer: "
        assert last.startswith(f"error: the stage PromptTokenizer did not start: CorruptFileError: {found}")
        assert started.leftovers() == {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-cpus", "1"], "0.9 CPU missing: the app needs 1.9 CPU and 0 GPU, Ray has 1 CPU and 0 GPU for it."),
        (
            ["--set", "transformer.gpus_per_rank=1", "--set", "vae.gpus_per_rank=0.5", "--cfg", "2", "--num-cpus", "4"],
            "2.5 GPU missing: the app needs 2.4 CPU and 2.5 GPU, Ray has 4 CPU and 0 GPU for it.",
        ),
        (["--ray-address", "127.0.0.1:9"], "cannot join the Ray cluster at 127.0.0.1:9: nothing listens there"),
    ],
)
@pytest.mark.slow  # tests/deployments shows the words
def test_too_few_resources_are_named(arguments: list[str], said: str, tiny_nano: Path, tmp_path: Path) -> None:
    with serving(tmp_path, "--checkpoint", str(tiny_nano), *arguments) as started:
        assert started.process.wait(DEADLINE_S) == 2, started.said()
        assert said in started.said().splitlines()[-1]
        assert started.leftovers() == {}


def test_a_taken_port_is_refused(tiny_nano: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with serving(tmp_path, "--checkpoint", str(tiny_nano), "--port", str(port)) as started:
            assert started.process.wait(DEADLINE_S) == 2, started.said()
            assert f"error: cannot listen on 127.0.0.1:{port}: Address already in use." in started.said()


@pytest.mark.slow  # the README's commands, which every change runs, go the same way
def test_the_demo_creates_its_checkpoint(tmp_path: Path) -> None:
    done = cosmos3("demo", "--checkpoint", "outputs/tiny", "--out", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "making a tiny checkpoint in outputs/tiny ..."
    num_bytes = (tmp_path / "demo.mp4").stat().st_size
    assert lines[-6] == f"demo.mp4: {num_bytes} bytes, 17 frames, 320x192, 24 fps"
    assert [line.split()[0] for line in lines[-5:]] == ["tokenize", "denoise", "decode_encode", "encode", "total"]
    assert probe_video(tmp_path / "demo.mp4").num_frames == 17
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["tiny"]


def test_subcommands_of_the_core_are_forwarded(tmp_path: Path) -> None:
    made = cosmos3("tiny-checkpoint", "tiny", "--variant", "edge", cwd=tmp_path)
    assert made.stdout.startswith("tiny: tiny edge, "), made.stderr
    assert (tmp_path / "tiny" / "model_index.json").is_file()
    refused = cosmos3("bench", "--random-weights", "huge", cwd=tmp_path)
    assert refused.returncode == 2
    assert "invalid choice: 'huge'" in refused.stderr
