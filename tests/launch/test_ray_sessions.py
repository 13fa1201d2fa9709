"""Directories of Ray's ended sessions are removed, those of running ones never."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deployments.launch.ray_session import remove_ended_sessions

pytestmark = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes are found in /proc")


def _make(root: Path, number: int) -> Path:
    path = root / f"session_2026-11-0{number}_10-00-00_000000_{number}"
    (path / "logs").mkdir(parents=True)
    (path / "logs" / "raylet.out").write_text("a line")
    return path


def test_all_but_the_newest_go(tmp_path: Path) -> None:
    old, older, newest = _make(tmp_path, 2), _make(tmp_path, 1), _make(tmp_path, 3)
    (tmp_path / "session_latest").symlink_to(newest)
    others = tmp_path / "session_notes", tmp_path / "prom_metrics_service_discovery.json"
    for path in others:
        path.write_text("of others")
    remove_ended_sessions(tmp_path)
    assert not old.exists()
    assert not older.exists()
    assert newest.exists()
    assert all(path.exists() for path in others)


def test_a_session_with_a_process_stays(tmp_path: Path) -> None:
    """Also one whose starter has ended, as after `ray start`."""
    running, ended, _ = _make(tmp_path, 1), _make(tmp_path, 2), _make(tmp_path, 3)
    code = "import sys; sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, f"--session-dir={running}"], stdin=subprocess.PIPE) as process:
        remove_ended_sessions(tmp_path)
        assert running.exists()
        assert not ended.exists()
        assert process.stdin is not None
        process.stdin.close()
