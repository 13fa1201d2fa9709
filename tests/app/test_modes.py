"""Every mode by handle and over HTTP gives the file, the frames and the actions of one process."""

from __future__ import annotations

import pytest

from tests.app.every_mode import check_mode
from tests.app.in_process import InProcessApp
from tests.core_reference import Reference
from tests.mode_inputs import MINIMAL

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("mode", MINIMAL)
def test_every_mode_by_handle_and_over_http_equals_one_process(
    mode: str, app: InProcessApp, reference: Reference
) -> None:
    check_mode(mode, app, reference)
