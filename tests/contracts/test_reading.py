"""Following one image-to-video request in process, from ``generate`` to the towers and the VAE, stays short.

The request runs on the tiny checkpoint under a trace, and every function of the core that it enters counts with its
signature and the statements that ran, each in full, without docstrings and comments. The trace does not enter what is
read apart: the inside of towers and VAE, operators, checkpoint, media files, checks of single values.
"""

import ast
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np

# 815 lines in commit 35475f6. The bound only gets lower.
MAX_LINES = 740
CORE = Path(__file__).parents[2] / "cosmos3_core"
APART = (
    *("vae", "ops", "checkpoint", "media", "model/towers.py"),
    *("checks.py", "field_spec.py", "errors.py", "device.py"),
)


class Trace:
    """Records the functions of a folder that run, and the lines that run in each."""

    def __init__(self, root: Path, apart: tuple[str, ...] = ()) -> None:
        self._root = root
        self._apart = tuple(root / name for name in apart)
        self._num_apart = 0
        self._ran: dict[CodeType, set[int]] = {}

    def run(self, work: Callable[[], Any]) -> None:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            work()
        finally:
            sys.settrace(before)

    def lines(self) -> dict[str, int]:
        """Return the functions that ran, each with its number of lines; not those that dataclasses generate."""
        return {
            f"{Path(code.co_filename).relative_to(self._root)}: {code.co_qualname}": count(function, ran)
            for code, ran in self._ran.items()
            if (function := functions_in(code.co_filename).get(code.co_firstlineno)) is not None
        }

    def _enter(self, frame: FrameType, event: str, value: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(self._root):
            return None
        if any(path.is_relative_to(apart) for apart in self._apart):
            self._num_apart += 1
            return self._leave
        if self._num_apart:
            return None
        self._ran.setdefault(frame.f_code, set())
        return self._line

    def _leave(self, frame: FrameType, event: str, value: Any) -> Any:
        self._num_apart -= event == "return"
        return self._leave

    def _line(self, frame: FrameType, event: str, value: Any) -> Any:
        if event == "line":
            self._ran[frame.f_code].add(frame.f_lineno)
        return self._line


@cache
def functions_in(path: str) -> dict[int, ast.FunctionDef]:
    tree = ast.parse(Path(path).read_text("utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {min([node.lineno, *(it.lineno for it in node.decorator_list)]): node for node in nodes}


def count(function: ast.FunctionDef, ran: set[int]) -> int:
    """Lines of the signature and of the statements that ran; of a statement with a block, its head."""
    lines = set(range(function.lineno, function.body[0].lineno))
    todo: list[Any] = list(function.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef):
            continue  # counted by itself
        for name in ("body", "orelse", "finalbody", "handlers", "cases"):
            todo += getattr(node, name, [])
        block = getattr(node, "body", [])
        end = max(block[0].lineno, node.lineno + 1) if block else node.end_lineno + 1
        span = set(range(node.lineno, end)) if isinstance(node, ast.stmt) else set()
        lines |= span if span & ran else set()
    return len(lines)


def test_an_image_to_video_request_reads_in_few_lines(tiny_nano, engine_for, tmp_path):
    from cosmos3_core.generate import generate
    from cosmos3_core.request import GenerationRequest

    engine = engine_for(tiny_nano)
    image = np.zeros((48, 48, 3), np.uint8)
    request = GenerationRequest(prompt="a", image=image, num_frames=5, height=48, width=48, num_inference_steps=2)
    trace = Trace(CORE, APART)
    trace.run(lambda: generate(engine, request, tmp_path / "clip"))
    lines = trace.lines()
    assert {
        "generate.py: generate",
        "resolve.py: resolve",
        "conditioning/clean.py: clean_latents",
        "denoiser.py: Denoiser.prepare",
        "denoiser.py: Denoiser.step",
        "model/transformer.py: Cosmos3Transformer.velocity",
        "engine.py: Engine.frames",
    } <= set(lines)
    assert sum(lines.values()) <= MAX_LINES, "\n".join(f"{num:4} {name}" for name, num in sorted(lines.items()))


PLANTED = """
def top(x):
    'Documented.'
    y = middle(x)
    if x > 10:
        y = never(
            x)
    return y

def middle(x):
    z = [it
         for it in (x, x)]
    # A comment.
    return sum(z)

def never(x):
    return middle(x)
"""


def test_lines_that_do_not_run_are_not_counted(tmp_path):
    path = tmp_path / "core" / "planted.py"
    path.parent.mkdir()
    path.write_text(PLANTED)
    names: dict[str, Any] = {}
    exec(compile(PLANTED, str(path), "exec"), names)
    trace = Trace(path.parent)
    trace.run(lambda: names["top"](1))
    assert trace.lines() == {"planted.py: top": 4, "planted.py: middle": 4}
    apart = Trace(tmp_path, ("core",))
    apart.run(lambda: names["top"](1))
    assert apart.lines() == {}
