"""Access control: API keys, ownership of jobs, cross-origin requests, and the paths that are open to all."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.api import auth as auths
from deployments.api.auth import LOOPBACK_HOSTS, Authenticator, NoKeys, check_keys, requires_key
from deployments.api.service import Service
from deployments.config import AppConfig, AuthConfig, HttpConfig, JobsConfig, MediaConfig
from deployments.errors import JobsError
from deployments.jobs.keys import KeyLimits, KeyStore, NewKey
from tests.api.fake_service import ID_ROUTES, UNKNOWN, Api, FakeReadiness

VIDEO = f"/v1/videos/{UNKNOWN}"
CALLS = [
    ("POST", "/v1/videos"),
    ("POST", "/v1/videos/sync"),
    ("GET", "/v1/videos"),
    ("GET", VIDEO),
    ("DELETE", VIDEO),
    ("POST", f"{VIDEO}/cancel"),
    ("POST", f"{VIDEO}/remix"),
    ("GET", f"{VIDEO}/content"),
    ("HEAD", f"{VIDEO}/content"),
    ("GET", f"{VIDEO}/events"),
    ("POST", "/v1/images/generations"),
    ("GET", "/v1/models"),
    ("GET", "/metrics"),
    ("GET", "/v1/nothing"),
    ("PATCH", "/v1/videos"),
]


def key_of(api: Api, name: str = "", **more: Any) -> dict[str, str]:
    """Make a key with a name of its own; return the header that sends it."""
    _, text = api.store.keys.create(NewKey(name=name or f"key {len(api.store.keys.list())}", **more))
    return {"authorization": f"Bearer {text}"}


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_every_route_needs_a_key_but_the_open_ones(method: str, path: str, keyed_api: Api) -> None:
    for headers in ({}, {"authorization": "Bearer c3_0000000000000000_" + "0" * 43}):
        answer = keyed_api.send(method, path, headers=headers, content=b"{")
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            assert answer.json()["error"]["code"] == ("wrong_api_key" if headers else "no_api_key")
    assert keyed_api.director.submitted == []


@pytest.mark.parametrize("path", ["/health", "/ready", "/openapi.json"])
def test_open_paths_need_no_key(path: str, keyed_api: Api) -> None:
    assert keyed_api.get(path).status_code == 200


def test_the_list_of_open_paths_is_complete(keyed_api: Api) -> None:
    for path in ("/health/", "//health", "/health/../v1/videos", "/ready/v1", "/v1/health"):
        assert keyed_api.get(path).status_code == 401


def test_a_valid_key_is_accepted(keyed_api: Api) -> None:
    headers = key_of(keyed_api)
    video = keyed_api.create(headers=headers)
    job = keyed_api.store.get(video["id"])
    assert job is not None
    assert f"c3_{job.owner}_" in headers["authorization"]
    assert keyed_api.get("/metrics", headers=headers).text == "cosmos3_requests_total 1\n"
    for scheme in ("bearer", "BEARER"):
        assert keyed_api.get(
            "/v1/models", headers={"authorization": headers["authorization"].replace("Bearer", scheme)}
        )


def test_a_key_outside_the_authorization_header_is_ignored(keyed_api: Api) -> None:
    text = key_of(keyed_api)["authorization"].removeprefix("Bearer ")
    for headers in (
        {"authorization": text},
        {"authorization": f"Basic {text}"},
        {"authorization": f"Bearer {text} "},
        {"authorization": f"Bearer  {text} x"},
        {"authorization": f"Bearer {text}".replace("_", " ", 1)},
        {"x-api-key": text},
        {"authorization": "Bearer " + "x" * 100_000},
        {"authorization": "Bearer"},
    ):
        assert keyed_api.get("/v1/models", headers=headers).status_code == 401
    assert keyed_api.get(f"/v1/models?api_key={text}").status_code == 401
    twice = [("authorization", f"Bearer {text}")] * 2
    assert keyed_api.get("/v1/models", headers=twice).status_code == 401


@pytest.mark.parametrize("state", ["queued", "in_progress", "completed", "failed"])
def test_another_keys_job_is_not_found(state: str, keyed_api: Api) -> None:
    mine, theirs = key_of(keyed_api, "a"), key_of(keyed_api, "b")
    video = keyed_api.create(headers=mine)
    if state != "queued":
        job = keyed_api.claim()
        if state == "completed":
            keyed_api.complete(job)
        if state == "failed":
            keyed_api.fail(job)
    for method, rest in ID_ROUTES:
        asked: dict[str, Any] = {"headers": theirs, **({"json": {"prompt": "a"}} if rest == "/remix" else {})}
        answers = [
            keyed_api.send(method, f"/v1/videos/{video_id}{rest}", **asked) for video_id in (video["id"], UNKNOWN)
        ]
        assert [answer.status_code for answer in answers] == [404, 404]
        assert method == "HEAD" or answers[0].json()["error"]["code"] == "not_found"
        assert answers[0].content == answers[1].content, "theirs and none are the same"
        assert dict(answers[0].headers) == dict(answers[1].headers)
    assert keyed_api.get("/v1/videos", headers=theirs).json()["data"] == []
    assert keyed_api.expect_refusal("GET", f"/v1/videos?after={video['id']}", 422, headers=theirs)["param"] == "after"
    assert keyed_api.get(f"/v1/videos/{video['id']}", headers=mine).json()["status"] == state, (
        "the calls with the other key left the job as it was"
    )


def test_each_key_has_its_own_idempotency_keys(keyed_api: Api) -> None:
    first, second = (
        keyed_api.create({"prompt": prompt}, headers={**key_of(keyed_api, prompt), "Idempotency-Key": "same"})
        for prompt in "ab"
    )
    assert first["id"] != second["id"]


def test_without_auth_jobs_of_keys_are_not_found(keyed_api: Api) -> None:
    video = keyed_api.create(headers=key_of(keyed_api))
    keyed_api.service.auth = None
    assert keyed_api.get(f"/v1/videos/{video['id']}").status_code == 404


def test_a_keys_own_limits_and_classes_apply(keyed_api: Api) -> None:
    headers = key_of(keyed_api, service_class="batch", limits=KeyLimits(max_queued=1))
    assert keyed_api.create({"prompt": "a"}, headers=headers)["service_class"] == "batch"
    answer = keyed_api.post("/v1/videos", json={"prompt": "b"}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
    error = keyed_api.expect_refusal(
        "POST", "/v1/videos", 422, json={"prompt": "a", "priority": "interactive"}, headers=headers
    )
    assert (error["param"], error["allowed"]) == ("priority", "one of ['batch']")
    headers = key_of(keyed_api, allowed_classes=("interactive",))
    video = keyed_api.create({"prompt": "a", "service_class": "interactive"}, headers=headers)
    assert video["service_class"] == "interactive"
    headers = key_of(keyed_api, service_class="gone")
    assert (
        keyed_api.expect_refusal("POST", "/v1/videos", 422, json={"prompt": "a"}, headers=headers)["param"]
        == "service_class"
    )


def test_a_revoked_key_is_refused_after_seconds_at_most(keyed_api: Api) -> None:
    now_s = [0.0]
    keyed_api.service.auth = Authenticator(keyed_api.store.keys, clock=lambda: now_s[0])
    key, text = keyed_api.store.keys.create(NewKey(name="a"))
    headers = {"authorization": f"Bearer {text}"}
    assert keyed_api.get("/v1/models", headers=headers).status_code == 200
    keyed_api.store.keys.revoke(key.key_id)
    assert keyed_api.get("/v1/models", headers=headers).status_code == 200, "as it was found before"
    now_s[0] += auths._CACHE_S + 0.1
    assert keyed_api.get("/v1/models", headers=headers).status_code == 401


def test_a_refusal_is_cached_for_five_seconds(keyed_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, answers = [0.0], [None, keyed_api.store.keys.create(NewKey(name="a"))[0]]
    keyed_api.service.auth = Authenticator(keyed_api.store.keys, clock=lambda: now_s[0])
    monkeypatch.setattr(keyed_api.store.keys, "verify", lambda text: answers.pop(0))
    for wait_s, status in ((0.0, 401), (4.0, 401), (1.1, 200), (4.0, 200)):
        now_s[0] += wait_s
        assert keyed_api.get("/v1/models", headers={"authorization": "Bearer k"}).status_code == status
    assert answers == [], "looked up twice"


def test_key_guessing_takes_bounded_capacity(keyed_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auths, "_MAX_WAITING", 8)
    monkeypatch.setattr(auths, "_MAX_CACHED", 16)
    headers = key_of(keyed_api)
    assert keyed_api.get("/v1/models", headers=headers).status_code == 200
    at_once, most, verify = [0], [0], keyed_api.store.keys.verify

    def verify_slowly(text: str) -> Any:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        try:
            return verify(text)
        finally:
            at_once[0] -= 1

    monkeypatch.setattr(keyed_api.store.keys, "verify", verify_slowly)

    async def guess() -> list[int]:
        answers = await asyncio.gather(
            *(keyed_api.asend("GET", "/v1/models", headers={"authorization": f"Bearer {i}"}) for i in range(60))
        )
        own = await keyed_api.asend("GET", "/v1/models", headers=headers)
        assert own.status_code == 200
        return [answer.status_code for answer in answers]

    statuses = keyed_api.run(guess())
    assert set(statuses) == {401, 429}
    assert most[0] <= auths._MAX_LOOKS
    assert keyed_api.service.auth is not None
    assert len(keyed_api.service.auth._unknown._found) <= 16


def test_without_the_key_database_every_key_is_refused(keyed_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(text: str) -> Any:
        raise JobsError("postgresql://user:secret@host is away")

    monkeypatch.setattr(keyed_api.store.keys, "verify", away)
    answer = keyed_api.get("/v1/models", headers={"authorization": "Bearer k"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "jobs_unavailable")
    assert "secret" not in answer.text


@pytest.mark.parametrize(
    ("configured", "host", "expected"),
    [
        (None, "127.0.0.1", False),
        (None, "127.1.2.3", False),
        (None, "::1", False),
        (None, "localhost", False),
        (None, "0.0.0.0", True),
        (None, "::", True),
        (None, "10.0.0.5", True),
        (None, "my-host", True),
        (None, "", True),
        (True, "127.0.0.1", True),
        (False, "0.0.0.0", False),
    ],
)
def test_keys_are_required_beyond_loopback(configured: bool | None, host: str, expected: bool) -> None:
    assert requires_key(configured, host) is expected


def test_an_app_with_auth_starts_only_if_a_key_exists(api: Api) -> None:
    keys = api.store.keys
    with pytest.raises(NoKeys, match=r"http\.host=0\.0\.0\.0.*`cosmos3 keys add NAME`.*--set auth\.enabled=false"):
        check_keys(keys, "0.0.0.0")
    key, _ = keys.create(NewKey(name="a"))
    check_keys(keys, "0.0.0.0")
    keys.revoke(key.key_id)
    with pytest.raises(NoKeys):
        check_keys(keys, "0.0.0.0")


OWN = {"localhost", "127.0.0.1", "[::1]"}


@pytest.mark.parametrize(
    ("host", "needs_keys", "allowed", "hosts"),
    [
        ("127.0.0.1", None, (), OWN),
        ("localhost", None, (), OWN),
        ("::1", None, (), OWN),
        ("127.0.0.2", None, (), OWN | {"127.0.0.2"}),
        ("0:0:0:0:0:0:0:1", None, (), OWN | {"[0:0:0:0:0:0:0:1]"}),
        ("127.0.0.1", False, ("Videos.Example", "[fd00::1]"), OWN | {"videos.example", "[fd00::1]"}),
        ("127.0.0.1", True, ("videos.example",), None),
        ("0.0.0.0", None, (), None),
        ("0.0.0.0", False, (), None),
        ("10.0.0.5", None, (), None),
        ("my-host", None, (), None),
    ],
)
def test_an_ingress_requires_a_key_or_its_own_host_name(
    host: str,
    needs_keys: bool | None,
    allowed: tuple[str, ...],
    hosts: set[str] | None,
    empty_database: Path,
    tiny_nano: Path,
    tmp_path: Path,
) -> None:
    """The operator can open the app to everyone who reaches the port."""
    database = tmp_path / "jobs.sqlite3"
    shutil.copy(empty_database, database)
    config = AppConfig(
        checkpoint=tiny_nano,
        http=HttpConfig(
            host="10.1.1.1", allowed_hosts=allowed
        ),  # Serve may listen on another address than the configuration's
        media=MediaConfig(directory=tmp_path / "media"),
        jobs=JobsConfig(database=f"sqlite:///{database}"),
        auth=AuthConfig(enabled=needs_keys),
    )

    def open_service() -> Service:
        director = SimpleNamespace(options=lambda *, stream: stream)
        service = Service.open(config, director, FakeReadiness(), host)
        service.jobs.store.close()
        return service

    if requires_key(needs_keys, host):
        with pytest.raises(NoKeys, match=f"http.host={host}"):
            open_service()
        keys = KeyStore.open(f"sqlite:///{database}")
        keys.create(NewKey(name="a"))
        keys.close()
    service = open_service()
    assert (service.auth is not None) == requires_key(needs_keys, host)
    assert service.hosts == hosts
    assert service.fetch_file is None, "no URL is fetched unless the operator enables it"


# Browsers


def test_cross_origin_requests_are_refused(api: Api) -> None:
    page = {"origin": "https://evil.example", "sec-fetch-site": "cross-site"}
    for answer in (
        api.get("/v1/videos", headers=page),
        api.send("OPTIONS", "/v1/videos", headers={**page, "access-control-request-method": "POST"}),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]
    for method, path in (("POST", "/v1/videos"), ("DELETE", VIDEO), ("POST", f"{VIDEO}/cancel")):
        error = api.expect_refusal(method, path, 403, headers=page, json={"prompt": "a"})
        assert error["code"] == "cross_origin"
    assert api.director.submitted == []
    for own in ({}, {"sec-fetch-site": "same-origin", "origin": "http://cosmos3"}, {"sec-fetch-site": "none"}):
        assert api.post("/v1/videos", json={"prompt": "a"}, headers=own).status_code == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site", "something new"])
def test_sec_fetch_site_decides(site: str, api: Api) -> None:
    """Another port of this machine is the same site, and allowed."""
    for more in ({}, {"origin": "http://cosmos3"}):
        error = api.expect_refusal(
            "POST", "/v1/videos", 403, headers={"sec-fetch-site": site, **more}, json={"prompt": "a"}
        )
        assert error["code"] == "cross_origin"
    for site in ("same-origin", "none"):  # a proxy may have rewritten Host
        page = {"sec-fetch-site": site, "origin": "https://videos.example"}
        assert api.post("/v1/videos", json={"prompt": "a"}, headers=page).status_code == 200


@pytest.mark.parametrize(
    ("origin", "host", "is_own"),
    [
        ("http://10.0.0.5:8000", "10.0.0.5:8000", True),
        ("http://Cosmos3", "cosmos3:80", True),
        ("https://cosmos3", "cosmos3", True),
        ("https://cosmos3", "COSMOS3:443", True),
        ("http://[fd00::1]:8000", "[fd00::1]:8000", True),
        ("http://10.0.0.5:3000", "10.0.0.5:8000", False),
        ("http://10.0.0.5", "10.0.0.5:8000", False),
        ("https://cosmos3", "cosmos3:80", False),
        ("http://evil.example", "10.0.0.5:8000", False),
        ("http://10.0.0.5.evil.example:8000", "10.0.0.5:8000", False),
        ("null", "10.0.0.5:8000", False),
        ("null", "null", False),
        ("", "", False),
    ],
)
def test_without_sec_fetch_site_the_origin_decides(origin: str, host: str, is_own: bool, api: Api) -> None:
    """Browsers omit the header for, say, a LAN address over plain http."""
    page = {"origin": origin, "host": host}
    for method, path in (("POST", "/v1/videos"), ("DELETE", VIDEO)):
        answer = api.send(method, path, headers=page, json={"prompt": "a"})
        assert (answer.status_code != 403) == is_own
        if not is_own:
            assert answer.json()["error"]["code"] == "cross_origin"
    assert api.get("/v1/models", headers=page).status_code == 200, "which such a page cannot read"


def test_a_listed_origin_may_call_whatever_sec_fetch_site_says(make_api: Callable[..., Api]) -> None:
    for origins in (("https://good.example",), ("*",)):
        api = make_api(http={"cors_origins": origins})
        for more in ({}, {"sec-fetch-site": "cross-site"}):
            page = {"origin": "https://good.example", **more}
            assert api.post("/v1/videos", json={"prompt": "a"}, headers=page).status_code == 200


def test_listed_origins_get_cors_headers(make_api: Callable[..., Api]) -> None:
    api = make_api(http={"cors_origins": ("https://good.example",)}, needs_keys=True)
    good = {"origin": "https://good.example", "sec-fetch-site": "cross-site"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    answer = api.send("OPTIONS", "/v1/videos", headers={**good, **asked})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://good.example")
    answer = api.post("/v1/videos", json={"prompt": "a"}, headers={**good, **key_of(api)})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://good.example")
    assert "x-video-id" in answer.headers["access-control-expose-headers"].lower()
    assert "access-control-allow-credentials" not in answer.headers
    assert api.get("/v1/videos", headers=good).headers["access-control-allow-origin"], "a page can read what is wrong"
    evil = {**good, "origin": "https://evil.example"}
    assert "access-control-allow-origin" not in api.get("/v1/models", headers={**evil, **key_of(api)}).headers
    assert api.post("/v1/videos", json={"prompt": "a"}, headers={**evil, **key_of(api)}).status_code == 403


# Client texts in answers


@pytest.mark.parametrize("text", ["a\r\nx-evil: 1", "a\nb", "\x00", "é", "a b", "x" * 200, ""])
def test_no_client_text_becomes_a_header(text: str, api: Api) -> None:
    for name in (b"x-request-id", b"idempotency-key"):
        answer = api.post("/v1/videos", json={"prompt": "a"}, headers={name: text.encode()})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_header")
        assert "x-evil" not in answer.headers
    odd = {"frame_interpolation_a\r\nx-evil: 1": 1}
    assert api.expect_refusal("POST", "/v1/videos/sync", 422, json={"prompt": "a", **odd})["param"] == next(iter(odd))
    body = {"prompt": text + "a", "user": text, "extra_params": {"max_sequence_length": text}}
    answer = api.post("/v1/videos/sync", json=body)
    assert answer.status_code == (422 if "\x00" in text else 200), answer.text
    assert "x-evil" not in answer.headers
    assert all(char.isprintable() and char.isascii() for value in answer.headers.values() for char in value)


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example:8000", 403), ("", 403)],
)
def test_without_keys_a_loopback_app_refuses_other_host_names(host: str, status: int, make_api: Any) -> None:
    """DNS rebinding leads a page's own name here; its Host header gives it away."""
    api = make_api()
    api.service.hosts = LOOPBACK_HOSTS
    answer = api.get("/v1/models", headers={"host": host})
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "wrong_host"
