"""README's blocks run as they stand, in an empty folder, with this environment's Python."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos3_core.media.probe import probe_video

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.timeout(900)
def test_every_block_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"^```(bash|python)\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "python", "bash"]
    for language, code in blocks:
        if language == "bash":
            # The environment is the one that runs this test.
            code = code.replace("make env\n", "").replace(".venv/bin/python", sys.executable)
            command = ["bash", "-euo", "pipefail", "-c", code]
        else:
            command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    first = probe_video(tmp_path / "first.mp4")
    assert (first.num_frames, first.height, first.width, first.fps) == (17, 192, 320, 24)
    assert probe_video(tmp_path / "library.mp4").num_frames == 9
