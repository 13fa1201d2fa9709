"""One start of four rank processes for everything that is asked of layouts here."""

from __future__ import annotations

from pathlib import Path

import pytest

from cosmos3_core.parallel.layout import Layout
from tests.parallel.gang_work import LAYOUTS, RankResult, latents_and_steps
from tests.ranks import run_layouts


@pytest.fixture(scope="session")
def ranks(tiny_nano: Path) -> dict[Layout, list[RankResult]]:
    """Layout -> the result of each of its ranks."""
    return dict(zip(LAYOUTS, run_layouts(latents_and_steps, LAYOUTS, tiny_nano), strict=True))
