"""Checkpoints of the Hugging Face hub: downloaded from a server that stands for it, and found in the local cache."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cosmos3_core.checkpoint.components import check_weights
from cosmos3_core.checkpoint.hub import HubModel, find_snapshot
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.errors import CheckpointError, MissingFileError, RequestError
from tests.checkpoint.hub_server import COMMIT, REPOSITORY, Hub, serving_hub
from tests.settling import eventually

_DEADLINE_S = 120.0


@pytest.fixture
def hub(tiny_nano: Path) -> Iterator[Hub]:
    """Serve a tiny checkpoint, and beside it what a download must leave alone."""
    files = {str(path.relative_to(tiny_nano)): path.read_bytes() for path in tiny_nano.rglob("*") if path.is_file()}
    others = [
        "README.md",
        "transformer/pytorch_model.bin",
        "vae/model.pt",
        "code.py",
        "vision_encoder/model.safetensors",
    ]
    with serving_hub(files | dict.fromkeys(others, b"x")) as served:
        yield served


def start(hub: Hub, home: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the command in a process of its own: huggingface_hub reads the environment when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "deployments", "download", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=home, env=environment, stdout=pipe, stderr=pipe, text=True)


def download(hub: Hub, home: Path, *arguments: str) -> tuple[int, str, str]:
    """Run the command to its end; return the exit status and what it said."""
    with start(hub, home, *arguments) as process:
        said, errors = process.communicate(timeout=_DEADLINE_S)
    return process.returncode, said, errors


def test_a_checkpoint_is_downloaded_and_found_by_its_names(
    hub: Hub, tmp_path: Path, tiny_nano: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, said, errors = download(hub, tmp_path, REPOSITORY)
    assert status == 0, errors
    assert said.startswith(f"{REPOSITORY} at {COMMIT}: 0.01 GB in ")
    assert "licence: open-model" in said
    assert said.endswith(f"  cosmos3 serve {REPOSITORY}\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--nvidia--Cosmos3-Tiny"
    for name in (REPOSITORY, f"{REPOSITORY}@main", f"{REPOSITORY}@{COMMIT}", "Cosmos3-Tiny", folder):
        layout = CheckpointLayout.open(name)
        assert layout.directory == folder / "snapshots" / COMMIT
        check_weights(layout)
    fetched = {str(path.relative_to(layout.directory)) for path in layout.directory.rglob("*") if path.is_file()}
    given = {str(path.relative_to(tiny_nano)) for path in tiny_nano.rglob("*") if path.is_file()}
    assert fetched == {name for name in given if not name.startswith("vision_encoder/")}
    with pytest.raises(MissingFileError, match="nor such a repository"):
        CheckpointLayout.open(f"{REPOSITORY}@fp8")
    (tmp_path / "hub" / "models--other--Cosmos3-Tiny").mkdir()
    with pytest.raises(CheckpointError, match="has nvidia/Cosmos3-Tiny and other/Cosmos3-Tiny"):
        CheckpointLayout.open("Cosmos3-Tiny")


def test_a_killed_download_fetches_only_what_is_not_whole(hub: Hub, tmp_path: Path) -> None:
    large = "sound_tokenizer/large.safetensors"
    hub.files[large] = bytes(25_000_000)
    hub.stop_after = 22_000_000
    here = tmp_path / "here"
    with start(hub, tmp_path, REPOSITORY, "--local-dir", "here") as process:
        assert hub.has_stalled.wait(_DEADLINE_S)
        assert eventually(lambda: (here / "vae" / "config.json").is_file(), _DEADLINE_S)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    hub.stop_after = None
    hub.goes_on.set()
    whole = {name for name in hub.files if (here / name).is_file()}
    assert large not in whole
    hub.asked.clear()
    status, said, errors = download(hub, tmp_path, REPOSITORY, "--local-dir", "here")
    assert status == 0, errors
    assert said.endswith("  cosmos3 serve here\n")
    fetched = {name for method, name, _ in hub.asked if method == "GET"}
    assert large in fetched
    assert not fetched & whole
    check_weights(CheckpointLayout.open(here))
    hub.asked.clear()
    status, said, _ = download(hub, tmp_path, REPOSITORY, "--local-dir", "here")
    assert (status, [it for it in hub.asked if it[0] == "GET"]) == (0, [])
    assert ", 0.00 GB of them to fetch" in said


def test_a_connection_that_breaks_goes_on_where_it_was(hub: Hub, tmp_path: Path) -> None:
    large = "sound_tokenizer/large.safetensors"
    hub.files[large] = bytes(25_000_000)
    hub.break_after = 22_000_000
    status, _, errors = download(hub, tmp_path, REPOSITORY)
    assert status == 0, errors
    begins = [begin for method, name, begin in hub.asked if (method, name) == ("GET", large)]
    assert begins[0] == 0
    assert begins[-1] >= 10_000_000


@pytest.mark.parametrize("ending", [".safetensors", "vae/config.json"])
def test_a_file_with_another_hash_is_refused_and_removed(ending: str, hub: Hub, tmp_path: Path) -> None:
    name = next(it for it in hub.files if it.endswith(ending) and not it.startswith("vision_encoder/"))
    hub.wrong = {name}
    status, _, errors = download(hub, tmp_path, REPOSITORY)
    assert status == 2
    assert f"{name}: has another hash than the hub states. Run the command again." in errors
    assert not list(tmp_path.rglob(name))
    hub.wrong = set()
    assert download(hub, tmp_path, REPOSITORY)[0] == 0


def test_names_that_lead_out_of_the_directory_are_left_alone(hub: Hub, tmp_path: Path) -> None:
    hub.files |= {"../evil.json": b"{}", "text_tokenizer/../../evil.json": b"{}", "text_tokenizer/..json": b"{}"}
    status, _, errors = download(hub, tmp_path, REPOSITORY, "--local-dir", "here")
    assert status == 0, errors
    assert not list(tmp_path.rglob("*evil*"))
    assert not (tmp_path / "here" / "text_tokenizer" / "..json").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("GatedRepo", f"{REPOSITORY}: its owner asks for consent. Accept the terms at http://"),
        ("RepoNotFound", f"{REPOSITORY}: no such repository at http://"),
        ("RevisionNotFound", f"{REPOSITORY}: {REPOSITORY} has no such revision. http://"),
    ],
)
def test_what_the_hub_refuses_is_said_in_a_line(error: str, said: str, hub: Hub, tmp_path: Path) -> None:
    hub.error = error
    status, _, errors = download(hub, tmp_path, REPOSITORY)
    assert status == 2
    assert f"error: {said}" in errors.splitlines()[-1]
    assert "Traceback" not in errors


def test_another_kind_of_model_is_refused_before_a_byte_of_it(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model_index.json"]
    status, _, errors = download(hub, tmp_path, REPOSITORY)
    assert status == 2
    assert f"{REPOSITORY}: has no model_index.json" in errors
    assert hub.asked == []


def test_a_hub_that_cannot_be_reached_is_said_in_a_line(hub: Hub, tmp_path: Path) -> None:
    hub.url = "http://127.0.0.1:9"
    status, _, errors = download(hub, tmp_path, REPOSITORY)
    assert status == 2
    assert f"error: {REPOSITORY}: cannot be downloaded: " in errors.splitlines()[-1]


@pytest.mark.parametrize("text", ["", "Cosmos3-Nano", "a/b/c", "../b", "a/b@", "https://huggingface.co/a/b"])
def test_a_name_without_an_owner_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="model must be OWNER/NAME"):
        HubModel.parse(text)


def test_a_folder_of_the_cache_with_several_commits_is_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "models--nvidia--Cosmos3-Nano"
    for commit in ("a", "b"):
        (folder / "snapshots" / commit).mkdir(parents=True)
    assert find_snapshot(folder) is None
    shutil.rmtree(folder / "snapshots" / "a")
    assert find_snapshot(folder) == folder / "snapshots" / "b"
