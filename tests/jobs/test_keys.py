"""API keys: created, verified, revoked; and the command."""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from cosmos3_core.errors import RequestError
from deployments.errors import JobsError
from deployments.jobs import keys
from deployments.jobs.keys import KeyLimits, KeyStore, NewKey
from deployments.jobs.schema import API_KEYS
from deployments.jobs.store import JobStore
from deployments.launch import cli
from tests.clock import Clock


def test_a_key_is_found_by_its_text(store: JobStore, clock: Clock) -> None:
    new = NewKey(
        name="Team Ä",
        service_class="batch",
        allowed_classes=("standard", "batch"),
        limits=KeyLimits(max_queued=7, max_running=2),
    )
    key, text = store.keys.create(new)
    assert re.fullmatch(r"c3_[0-9a-f]{16}_[A-Za-z0-9_-]{43}", text)
    assert text.startswith(f"c3_{key.key_id}_")
    assert (key.name, key.service_class, key.allowed_classes) == ("Team Ä", "batch", ("batch", "standard"))
    assert (key.limits, key.created_s, key.revoked_s) == (new.limits, clock.now_s, None)
    assert store.keys.verify(text) == key
    assert store.keys.list() == (key,)
    plain, other_text = store.keys.create(NewKey(name="b"))
    assert plain.limits == KeyLimits(None, None)
    assert plain.allowed_classes == ("standard",)
    assert store.keys.verify(other_text) == plain


def test_no_key_text_is_stored(store: JobStore, jobs_url: str) -> None:
    key, text = store.keys.create(NewKey(name="a"))
    secret = text.removeprefix(f"c3_{key.key_id}_")
    assert key.secret_sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert key.secret_sha256 not in repr(key)
    with store._database.reading() as connection:
        kept = str(connection.exec_driver_sql("SELECT * FROM api_keys").all())
    assert secret not in kept
    if jobs_url.startswith("sqlite:///"):
        path = Path(jobs_url.removeprefix("sqlite:///"))
        for file in path.parent.glob(f"{path.name}*"):
            assert secret.encode() not in file.read_bytes()


def wrong_texts(text: str) -> list[str]:
    """Texts that almost match a key."""
    key_id, secret = text[3:19], text[20:]
    changed = ("A" if secret[0] != "A" else "B") + secret[1:]
    return [
        "",
        "c3_",
        "x" * 100_000,
        "c3_" + "é" * 16 + "_" + secret,
        f"c3_{key_id}_{secret}\n",
        f" c3_{key_id}_{secret}",
        f"c3_{key_id}_{secret[:-1]}",
        f"c3_{key_id.upper()}_{secret}" if key_id.upper() != key_id else "c3_",
        f"c3_{'0' * 16}_{secret}",
        f"c3_{key_id}_{changed}",
        f"c3_{key_id}_{hashlib.sha256(secret.encode()).hexdigest()[:43]}",
        "c3_none_none",
    ]


def test_any_other_text_is_refused(store: JobStore) -> None:
    _, text = store.keys.create(NewKey(name="a"))
    for wrong in wrong_texts(text):
        assert store.keys.verify(wrong) is None, wrong


def test_every_refusal_takes_the_same_work(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reveal by its time nothing about a wrong key: each costs one query, one hash and one constant-time comparison."""
    revoked, revoked_text = store.keys.create(NewKey(name="gone"))
    store.keys.revoke(revoked.key_id)
    _, text = store.keys.create(NewKey(name="a"))
    done: list[str] = []

    def count(name: str, function: Any) -> Any:
        return lambda *given: (done.append(name), function(*given))[1]

    def note(*_: Any) -> None:
        done.append("look")

    monkeypatch.setattr(hmac, "compare_digest", count("compare", hmac.compare_digest))
    monkeypatch.setattr(keys, "_hash", count("hash", keys._hash))
    sqlalchemy.event.listen(store._database._engine, "before_cursor_execute", note)
    assert store.keys.verify(text) is not None
    expected, done[:] = list(done), []
    assert [expected.count(what) for what in ("hash", "compare")] == [1, 1]
    assert "look" in expected
    for wrong in (*wrong_texts(text), revoked_text):
        assert store.keys.verify(wrong) is None
        assert done == expected, wrong
        done.clear()


def test_a_revoked_key_is_refused_but_still_listed(store: JobStore, clock: Clock) -> None:
    key, text = store.keys.create(NewKey(name="a"))
    other, other_text = store.keys.create(NewKey(name="b"))
    clock.advance(5)
    revoked = store.keys.revoke(key.key_id)
    assert revoked.revoked_s == clock.now_s
    assert store.keys.verify(text) is None
    assert store.keys.verify(other_text) == other
    clock.advance(5)
    assert store.keys.revoke(key.key_id) == revoked, "a second time changes nothing"
    assert {found.key_id: found for found in store.keys.list()} == {key.key_id: revoked, other.key_id: other}
    with pytest.raises(RequestError, match="key must be the id of a key.* .got 'x'"):
        store.keys.revoke("x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": " "}, "name must be a text with at least one visible character (got ' ')"),
        ({"name": "x" * 201}, "at most 200 characters"),
        ({"name": "a\x1b[2Jb"}, "printable"),
        ({"limits": KeyLimits(max_queued=0)}, "max_queued must be a whole number from 1 to 1000000 (got 0)"),
        ({"limits": KeyLimits(max_running=-1)}, "max_running must be a whole number from 1 to 1000000 (got -1)"),
    ],
)
def test_an_invalid_key_is_not_created(store: JobStore, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        store.keys.create(NewKey(**{"name": "a", **changes}))
    assert store.keys.list() == ()


def test_a_name_is_that_of_one_valid_key(store: JobStore) -> None:
    first, text = store.keys.create(NewKey(name="a"))
    with pytest.raises(RequestError, match="name must be a name that no valid key has .*Remove that one first"):
        store.keys.create(NewKey(name="a"))
    assert store.keys.revoke("a").key_id == first.key_id
    assert store.keys.verify(text) is None
    with pytest.raises(RequestError, match="or the name of a valid one"):
        store.keys.revoke("a")
    second, _ = store.keys.create(NewKey(name="a"))
    assert store.keys.revoke("a").key_id == second.key_id


def test_of_several_keys_of_one_name_the_id_is_asked_for(store: JobStore) -> None:
    """Earlier releases allowed them."""
    made = [store.keys.create(NewKey(name=name))[0].key_id for name in ("a", "b")]
    with store._database.writing() as connection:
        connection.execute(API_KEYS.update().values(name="a"))
    with pytest.raises(RequestError, match=re.escape(" and ".join(sorted(made)) + " have that name")):
        store.keys.revoke("a")
    assert store.keys.revoke(made[1]).key_id == made[1]


def test_the_number_of_keys_is_bounded(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MAX_KEYS", 2)
    made = [store.keys.create(NewKey(name=name))[0] for name in ("a", "b")]
    with pytest.raises(JobsError, match="at most 2 keys may be valid.*revoke one first"):
        store.keys.create(NewKey(name="c"))
    store.keys.revoke(made[0].key_id)
    store.keys.create(NewKey(name="a"))


# The command


def cosmos3(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command; return exit status, output and errors."""
    status = cli.main(["keys", *arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_adds_lists_and_removes_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path}/jobs.sqlite3"
    where = ("--database", url)
    status, text, said = cosmos3(
        capsys, "add", "team-a", "--class", "batch", "--allow", "interactive", "--max-queued", "9", *where
    )
    assert status == 0
    store = KeyStore.open(url)
    key = store.verify(text.strip())
    assert key is not None
    assert key.key_id in said
    assert text.strip() not in said
    assert (key.service_class, key.allowed_classes, key.limits) == ("batch", ("batch", "interactive"), KeyLimits(9))
    assert cosmos3(capsys, "add", "team-b", *where)[0] == 0
    status, table, _ = cosmos3(capsys, "list", *where)
    assert status == 0
    lines = table.splitlines()
    assert len(lines) == 3
    assert re.match(rf"{key.key_id}  team-a  batch +batch,interactive +9 +default +20\d\d-\d\d-\d\d$", lines[1])
    assert key.secret_sha256 not in table
    status, said, _ = cosmos3(capsys, "remove", key.key_id, *where)
    assert (status, said.startswith(f"{key.key_id} (team-a) is refused from now on")) == (0, True)
    assert store.verify(text.strip()) is None
    assert re.search(r"20\d\d-\d\d-\d\d  20\d\d-\d\d-\d\d$", cosmos3(capsys, "list", *where)[1].splitlines()[1])
    store.close()


def test_the_command_finds_the_apps_database(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    assert cosmos3(capsys, "add", "a")[0] == 0
    assert (tmp_path / "home/.local/state/cosmos3/jobs-cosmos3.sqlite3").is_file()
    assert cosmos3(capsys, "add", "a", "--name", "mine", "--set", f"media.directory={tmp_path}/media")[0] == 0
    assert (tmp_path / "media/jobs-mine.sqlite3").is_file()
    (tmp_path / "app.yaml").write_text(f"checkpoint: x\njobs: {{database: 'sqlite:///{tmp_path}/own.sqlite3'}}\n")
    assert cosmos3(capsys, "add", "a", "--config", str(tmp_path / "app.yaml"))[0] == 0
    assert (tmp_path / "own.sqlite3").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("add", "a", "--class", "btch"), "class must be one of .* .got 'btch'.* did you mean batch"),
        (("add", "a", "--allow", "x"), "allow must be one of .* .got 'x'"),
        (("add", "a", "--max-queued", "0"), "max_queued must be .* .got 0"),
        (("remove", "x"), "`cosmos3 keys list` shows them"),
        (("list", "--set", "jobs.x=1"), "jobs.x: no such key"),
    ],
)
def test_the_command_reports_errors_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    status, said, error = cosmos3(capsys, *arguments, "--database", f"sqlite:///{tmp_path}/jobs.sqlite3")
    assert (status, said) == (2, "")
    assert re.search(message, error)
