"""Reference results of the core in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cosmos3_core.engine import Engine
from cosmos3_core.generate import GenerationResult, generate
from cosmos3_core.request import GenerationRequest

Reference = Callable[[GenerationRequest], GenerationResult]


@pytest.fixture(scope="session")
def reference(tiny_nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    """Return a request's result in one process, without Ray; each is computed once."""
    results: dict[Any, GenerationResult] = {}
    directory = tmp_path_factory.mktemp("reference")
    with Engine(tiny_nano, device="cpu") as engine:

        def get(request: GenerationRequest) -> GenerationResult:
            packed = request.packed()
            # Requests count as equal whatever media they bring.
            key = (request, *(hash(bytes(media)) for media in (packed.image, packed.video) if media is not None))
            if key not in results:
                results[key] = generate(engine, packed, directory / str(len(results)))
            return results[key]

        yield get
