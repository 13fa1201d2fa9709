"""The progress reporter, with a clock that the test turns."""

import io

import pytest

from cosmos3_core.progress import ProgressBar
from tests.clock import Clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(stream, total, seconds_per_step=2.0, label="denoise"):
    clock = Clock()
    progress = ProgressBar(stream, clock)
    progress.start(total, label)
    for step in range(1, total + 1):
        clock.advance(seconds_per_step)
        progress.update(step)
    progress.close()
    return stream.getvalue()


def test_a_log_gets_whole_plain_lines():
    lines = run(io.StringIO(), 4).splitlines()
    assert lines == [
        "denoise 1/4, 0.50 steps/s, 0:06 left",
        "denoise 2/4, 0.50 steps/s, 0:04 left",
        "denoise 3/4, 0.50 steps/s, 0:02 left",
        "denoise 4/4, 0.50 steps/s, took 0:08",
    ]


@pytest.mark.parametrize("total", [1, 9, 10, 11, 35, 50, 1000])
def test_a_log_gets_few_lines_and_the_last_step(total):
    text = run(io.StringIO(), total)
    lines = text.splitlines()
    assert min(total, 8) <= len(lines) <= 11
    assert lines[-1].startswith(f"denoise {total}/{total}, ")
    assert "\r" not in text
    assert "\x1b" not in text


def test_a_terminal_gets_one_line_that_updates_itself():
    text = run(Terminal(), 4)
    assert text.count("\n") == 1
    assert text.endswith("\n")
    drawn = text.rstrip("\n").split("\r")
    assert drawn[0] == ""
    assert drawn[1] == "[######..................] denoise 1/4, 0.50 steps/s, 0:06 left\x1b[K"
    assert drawn[-1] == "[########################] denoise 4/4, 0.50 steps/s, took 0:08\x1b[K"


def test_a_terminal_is_not_redrawn_for_every_quick_step():
    drawn = run(Terminal(), 1000, seconds_per_step=0.01).split("\r")
    assert 90 <= len(drawn) <= 110
    assert "denoise 1000/1000" in drawn[-1]


def test_hours_are_shown():
    assert "1:00:00 left" in run(io.StringIO(), 2, seconds_per_step=3600)


def test_a_run_that_stops_early_leaves_the_cursor_on_a_fresh_line():
    stream, clock = Terminal(), Clock()
    progress = ProgressBar(stream, clock)
    progress.start(10, "denoise")
    progress.close()
    assert stream.getvalue() == ""
    progress.start(10, "denoise")
    progress.update(1)
    progress.close()
    progress.close()
    progress.update(2)
    assert stream.getvalue().endswith("[K\n")
    assert "2/10" not in stream.getvalue()


def test_a_second_run_starts_afresh():
    stream, clock = io.StringIO(), Clock()
    progress = ProgressBar(stream, clock)
    for label in ("denoise", "decode"):
        progress.start(2, label)
        clock.now_s += 1
        progress.update(1)
        clock.now_s += 1
        progress.update(2)
    assert [line.split(",")[0] for line in stream.getvalue().splitlines()] == [
        "denoise 1/2",
        "denoise 2/2",
        "decode 1/2",
        "decode 2/2",
    ]
    assert stream.getvalue().count("took 0:02") == 2


def test_no_time_no_rate():
    assert run(io.StringIO(), 1, seconds_per_step=0) == "denoise 1/1\n"


def test_a_run_of_no_steps_is_quiet():
    assert run(io.StringIO(), 0) == ""


def test_stderr_is_looked_up_when_the_run_starts(capsys):
    progress = ProgressBar()
    progress.start(1, "denoise")
    progress.update(1)
    progress.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("denoise 1/1")
