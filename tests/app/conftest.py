"""One app in process for the whole folder, and others that differ in their configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.app.in_process import InProcessApp, app_config, local_ray
from tests.app.local_ray import Loop
from tests.core_reference import reference  # noqa: F401  fixtures


@pytest.fixture(scope="package")
def loop() -> Iterator[Loop]:
    with local_ray() as loop:
        yield loop


@pytest.fixture(scope="package")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The media store that all apps share."""
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="package")
def app(loop: Loop, tiny_nano: Path, media: Path) -> Iterator[InProcessApp]:
    """The app that most tests share."""
    app = InProcessApp(loop, "shared", app_config(tiny_nano, media, "shared", {}))
    yield app
    app.close()


@pytest.fixture(scope="module")
def start_app(loop: Loop, tiny_nano: Path, media: Path) -> Iterator[Callable[..., InProcessApp]]:
    """Start an app with some keys of the laptop's configuration replaced; it ends with the module."""
    apps: list[InProcessApp] = []

    def start(name: str, **overrides: Any) -> InProcessApp:
        apps.append(InProcessApp(loop, name, app_config(tiny_nano, media, name, overrides)))
        return apps[-1]

    yield start
    for app in apps:
        app.close()
