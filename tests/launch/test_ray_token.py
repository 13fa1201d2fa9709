"""Ray's token is for its user alone."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deployments.launch.ray_token import TokenError, protect_token


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_for_its_user_alone(tmp_path: Path) -> None:
    protect_token(tmp_path)
    token = tmp_path / ".ray" / "auth_token"
    assert (_mode(token), _mode(token.parent)) == (0o600, 0o700)
    assert len(token.read_text()) == 64
    assert list(token.parent.iterdir()) == [token]


def test_an_earlier_token_stays_and_is_closed(tmp_path: Path) -> None:
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("earlier")
    token.chmod(0o644)
    protect_token(tmp_path)
    assert (_mode(token), _mode(token.parent)) == (0o600, 0o700)
    assert token.read_text() == "earlier"


def test_starts_at_once_have_the_same_token(tmp_path: Path) -> None:
    token = tmp_path / ".ray" / "auth_token"

    def read(_: int) -> str:
        protect_token(tmp_path)
        return token.read_text()

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(read, range(32)))) == 1


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".ray").write_text("a file")
    with pytest.raises(TokenError, match=r"\.ray/auth_token must be a file that this user alone can read"):
        protect_token(tmp_path)
