"""The product's sources, parsed once, for tests of the architecture's rules.

Every rule is a function from sources to a list of violations, worded for their author. It is applied twice: to the
product, where it must find nothing, and to planted sources, where it must find what was planted.
"""

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("cosmos3_core", "cluster", "deployments")


@dataclass(frozen=True)
class Source:
    """One Python file of the product."""

    path: PurePosixPath  # relative to the repository root
    text: str = field(repr=False)

    @property
    def package(self) -> str:
        return self.path.parts[0]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))

    @cached_property
    def definitions(self) -> list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
        """The module and all its classes and functions, nested ones included."""
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        return [node for node in ast.walk(self.tree) if isinstance(node, kinds)]

    def is_in(self, *folders: str) -> bool:
        return any(self.path.is_relative_to(folder) for folder in folders)

    def identifiers(self) -> Iterator[tuple[str, int]]:
        """Every name that the file defines, uses or imports, with its line."""
        for node in ast.walk(self.tree):
            line = getattr(node, "lineno", 0)
            match node:
                case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                    yield name, line
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                    yield name, line
                case ast.Import(names=aliases):
                    for alias in aliases:
                        yield from ((part, line) for part in [*alias.name.split("."), alias.asname or ""])
                case ast.ImportFrom(module=module, names=aliases):
                    for alias in aliases:
                        yield from (
                            (part, line) for part in [*(module or "").split("."), alias.name, alias.asname or ""]
                        )


def read_sources(paths: Iterable[Path]) -> list[Source]:
    return [Source(PurePosixPath(path.relative_to(ROOT).as_posix()), path.read_text("utf-8")) for path in sorted(paths)]


@pytest.fixture(scope="session")
def product() -> list[Source]:
    """Every Python file of the packages that exist."""
    return read_sources(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.fixture(scope="session")
def core(product: list[Source]) -> list[Source]:
    """The files of cosmos3_core."""
    return [source for source in product if source.package == "cosmos3_core"]


@pytest.fixture(scope="session")
def planted() -> Callable[[str, str], list[Source]]:
    """Make a source file in memory, for a rule's self-check."""
    return lambda path, text: [Source(PurePosixPath(path), text)]
