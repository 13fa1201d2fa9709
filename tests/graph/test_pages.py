"""The code blocks of README and ``docs/`` run unchanged, in order, in an empty folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cosmos3_core.checkpoint.tiny import build_tiny_checkpoint
from cosmos3_core.media.probe import probe_video
from tests.pages import BACKGROUND, DOWNLOAD, PAGES, README, App, app_served, blocks_of, run_blocks

pytestmark = pytest.mark.serve


def assert_frames(folder: Path, expected: dict[str, int]) -> None:
    for name, num_frames in expected.items():
        assert probe_video(folder / f"{name}.mp4").num_frames == num_frames, name


@pytest.mark.timeout(900)
def test_readme(tmp_path: Path) -> None:
    blocks = [block for block in blocks_of(README) if block.kind != "text"]
    kinds = [block.kind for block in blocks]
    assert kinds == ["bash", "bash", DOWNLOAD, BACKGROUND, "bash", "python"]
    start = kinds.index(BACKGROUND)
    run_blocks(blocks[:start], tmp_path)
    with app_served(blocks[start].code, tmp_path) as app:
        run_blocks(blocks[start:], tmp_path, app)
    first = probe_video(tmp_path / "first.mp4")
    assert (first.num_frames, first.height, first.width, first.fps) == (17, 192, 320, 24)
    assert_frames(tmp_path, {"curl": 17, "job": 17, "python": 9, "created": 9})
    text = (tmp_path / "events.txt").read_text()
    assert text.count("event: step") == 8
    assert "event: completed" in text


def test_readme_downloads_by_a_command_that_exists() -> None:
    (download,) = (block.code for block in blocks_of(README) if block.kind == DOWNLOAD)
    program, subcommand, *_ = download.split()
    command = [str(Path(sys.executable).parent / Path(program).name), subcommand, "--help"]
    flags = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    given = re.findall(r"--[a-z-]+", download)
    assert all(flag in flags for flag in given)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, App]]:
    """A folder with the tiny checkpoint and the app that README starts with it."""
    folder = tmp_path_factory.mktemp("pages")
    build_tiny_checkpoint(folder / "tiny-nano", "nano")
    (start,) = (block.code for block in blocks_of(README) if block.kind == BACKGROUND)
    with app_served(start, folder) as app:
        yield folder, app


def check_http_api(folder: Path) -> None:
    assert_frames(folder, {"sync": 17, "job": 17, "live": 33, "whole": 33, "posted": 13, "openai": 9})
    assert_frames(folder, {"handle": 9, "events": 9, "created": 9})
    for name in ("text", "image", "video", "waves", "loud", "louder", "policy", "carried"):
        info = probe_video(folder / f"{name}.mp4")
        assert info.num_frames == (17 if name in ("policy", "carried") else 13)
        assert (info.sound is not None) == (name in ("waves", "loud", "louder"))
    for name in ("policy", "found"):
        assert json.loads((folder / f"{name}.actions.json").read_text())["shape"] == [16, 10]
    assert not (folder / "found.mp4").exists()
    assert (folder / "picture.png").exists()
    assert (folder / "part.bin").stat().st_size == 100
    assert (folder / "thumbnail.webp").read_bytes()[8:12] == b"WEBP"
    text = (folder / "events.txt").read_text()
    assert text.count("event: step") == 8
    assert "event: completed" in text
    assert len(json.loads((folder / "images.json").read_text())["data"]) == 2


def check_library(folder: Path) -> None:
    assert_frames(folder, {"call": 9, "library": 9, "two-ranks": 9})


def check_jobs_and_operations(folder: Path) -> None:
    assert (folder / "alice.key").read_text().startswith("c3_")
    assert "ray_cosmos3_scrape_failures" in (folder / "metrics.txt").read_text()


CHECKS: dict[str, Callable[[Path], None]] = {
    "http-api": check_http_api,
    "jobs-and-operations": check_jobs_and_operations,
    "library": check_library,
}
"""Name of a page -> what its blocks leave behind."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    blocks = blocks_of(page)
    folder, app = tmp_path, None
    if any(":8000" in block.code or "connect()" in block.code for block in blocks):
        folder, app = request.getfixturevalue("served")
    run_blocks(blocks, folder, app)
    if page.stem in CHECKS:
        CHECKS[page.stem](folder)
