"""Peak memory is that of the work, whatever the process that asks has held before."""

from __future__ import annotations

import numpy as np
import pytest

from cosmos3_core.bench import peak
from cosmos3_core.errors import MeasureError
from tests.bench.memory_work import prepare, prepare_failing


def test_the_peak_is_the_works_own() -> None:
    """Neither what this process has held, nor what is there before the work begins, nor that the work gives it back."""
    num_ones = int(np.ones(300 * 10**6, np.uint8).sum())
    grown = peak.peak_growth_bytes(prepare, 150, 60)
    assert num_ones == 300 * 10**6
    assert 59e6 < grown < 70e6  # the kernel counts resident pages to within some hundred kilobytes


@pytest.mark.parametrize(
    ("how", "said"),
    [("raise", "ValueError: the work's own trouble"), ("die", "died with exit status 3"), ("hang", "more than 1 s")],
)
def test_work_that_comes_to_nothing_is_an_error(how: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "hang":
        monkeypatch.setattr(peak, "_LIMIT_S", 1.0)
    with pytest.raises(MeasureError, match=said):
        peak.peak_growth_bytes(prepare_failing, how)
