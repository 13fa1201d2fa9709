"""`cosmos3 logs`: the lines of all processes, in the order of time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deployments.launch.cli import main


def record(at: str, message: str, **more: object) -> str:
    return json.dumps({"asctime": f"2026-11-30 10:00:{at}", "levelname": "INFO", "message": message, **more}) + "\n"


@pytest.fixture
def session(tmp_path: Path) -> Path:
    serve = tmp_path / "logs" / "serve"
    serve.mkdir(parents=True)
    director = {"deployment": "shared_Director", "process": 7}
    (serve / "replica_shared_Director_a.log.1").write_text(record("01,000", "an earlier file", **director))
    (serve / "replica_shared_Director_a.log").write_text(
        record("02,000", "begun", request_id="r1", **director)
        + record("05,000", "ended", request_id="r1", job_id="video_gen_1", **director)
        + record("06,000", "ended", request_id="r2", **director)
    )
    (tmp_path / "logs" / "worker-1-2-3.err").write_text(
        "noise before any time\n"
        + record("03,000", "step", request_id="r1", gang="TransformerRank", rank=1, process=9)
        + "ERROR 2026-11-30 10:00:04,000 serve 9 r1 -- failed\nTraceback (most recent call last):\n  ...\n"
        + record("07,000", "idle", process=9)
    )
    (tmp_path / "logs" / "raylet.out").write_text("not ours\n")
    return tmp_path


def lines(session: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["logs", "--session", str(session), *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_all_lines_are_merged_by_time(session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = lines(session, capsys)
    assert shown[:3] == [
        "2026-11-30 10:00:01,000 INFO Director[7] an earlier file",
        "2026-11-30 10:00:02,000 INFO Director[7] r1 begun",
        "2026-11-30 10:00:03,000 INFO TransformerRank 1[9] r1 step",
    ]
    assert len(shown) == 9
    assert shown[4] == "Traceback (most recent call last):"


@pytest.mark.parametrize(("part", "num_lines"), [("r1", 6), ("video_gen_1", 1), ("r2", 1)])
def test_one_requests_lines_come_with_their_tracebacks(
    part: str, num_lines: int, session: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = lines(session, capsys, part)
    assert len(shown) == num_lines
    assert ("  ..." in shown) == (part == "r1")


def test_no_line_is_status_1_and_no_session_an_error(session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "--session", str(session), "no-such-id"]) == 1
    assert main(["logs", "--session", str(session / "logs")]) == 2
    assert "the directory of a session of Ray, with logs/ in it" in capsys.readouterr().err
