"""`make env`: which Pythons it takes, and what it would install: Python is a script that notes its arguments."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).parents[2]
# Runs the code of -c as if it were another version, copies itself as `-m venv` does, and notes anything else.
_PYTHON = """#!{executable}
import pathlib, shutil, sys
sys.version_info = {version}
if sys.argv[1] == "-c":
    exec(sys.argv[2])
elif sys.argv[1:3] == ["-m", "venv"]:
    place = pathlib.Path(sys.argv[3], "bin")
    place.mkdir(parents=True)
    shutil.copy(__file__, place / "python")
else:
    with open("said.txt", "a") as file:
        print(*sys.argv[1:], file=file)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(_REPOSITORY / name, tmp_path)
    return tmp_path


def make_python(path: Path, version: tuple[int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_PYTHON.format(executable=sys.executable, version=version))
    path.chmod(0o755)
    return path


def make(place: Path, target: str, python: Path) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", target, f"PYTHON={python}"]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_another_python_is_refused_in_one_sentence(version: tuple[int, int], place: Path) -> None:
    done = make(place, "env", make_python(place / "other", version))
    said = f"Python 3.11 to 3.13 is needed (got 3.{version[1]}): "
    said += "name one that you have, as in make env PYTHON=python3.12"
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, said)
    assert not (place / ".venv").exists()


def test_an_environment_of_another_python_is_made_anew(place: Path) -> None:
    make_python(place / ".venv" / "bin" / "python", (3, 10))
    (place / ".venv" / "old").touch()
    done = make(place, "env", make_python(place / "python", (3, 12)))
    assert done.returncode == 0, done.stderr
    assert not (place / ".venv" / "old").exists()
    assert make(place, "env", place / "no such").returncode == 0, "it stays"


def test_what_tests_need_is_installed_for_them_alone(place: Path) -> None:
    python = make_python(place / "python", (3, 13))
    assert make(place, "env", python).returncode == 0
    installed = ["torch", "-e ."]
    said = place / "said.txt"
    assert said.read_text().splitlines() == [f"-m pip install -c constraints.txt {it}" for it in installed]
    assert make(place, "dev", python).returncode == 0
    assert said.read_text().splitlines()[2:] == ["-m pip install --quiet -c constraints.txt -e .[test]"]
