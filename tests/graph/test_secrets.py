"""Nothing that an app shows, logs or passes on holds a key, the database's password or Ray's token."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path

import httpx2
import pytest

from tests.graph.serving import DEADLINE_S, Serving, environment, serving
from tests.jobs.postgres import PASSWORD, fresh_database
from tests.settling import eventually

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

_CLIP = {"prompt": "A car.", "num_frames": 5, "height": 64, "width": 96, "num_inference_steps": 2}
_OPEN_PATHS = ("/health", "/ready", "/openapi.json", "/-/healthz", "/-/routes", "/no/such/path")
_GUARDED_PATHS = ("/metrics", "/v1/models", "/v1/videos", "/v1/videos?limit=x", "/v1/videos/no-such-id")


def _crawl(url: str, key: str, shown: list[str]) -> None:
    """Ask for everything, with the key, without one and with a broken one; keep all answers and their URLs."""
    with httpx2.Client(base_url=url, timeout=DEADLINE_S) as http:

        def call(method: str, path: str, given: str | None, **content: object) -> httpx2.Response:
            headers = {} if given is None else {"authorization": f"Bearer {given}"}
            answer = http.request(method, path, headers=headers, **content)  # type: ignore[arg-type]
            shown.extend((str(answer.url), repr(answer.headers), answer.text))
            return answer

        for path in (*_OPEN_PATHS, *_GUARDED_PATHS):
            for given in (None, key[:-1] + ("a" if key[-1] != "a" else "b"), key):
                call("GET", path, given)
        assert call("POST", "/v1/videos", None, json=_CLIP).status_code == 401
        created = call("POST", "/v1/videos", key, json=_CLIP)
        assert created.status_code == 200, created.text
        job = f"/v1/videos/{created.json()['id']}"
        assert eventually(lambda: call("GET", job, key).json()["status"] == "completed", DEADLINE_S)
        for path in (job, f"{job}/events", f"{job}/content?variant=thumbnail"):
            assert call("GET", path, key).status_code == 200, path
        assert call("POST", "/v1/videos", key, json={**_CLIP, "height": 7}).status_code == 422
        assert call("DELETE", job, key).status_code == 200


def _find(secrets: dict[str, str], text: str) -> set[str]:
    return {what for what, secret in secrets.items() if secret in text}


def _read_tree(directory: Path) -> dict[Path, str]:
    return {path: path.read_text(errors="replace") for path in directory.rglob("*") if path.is_file()}


def _read_commands(app: Serving) -> dict[Path, str]:
    return {Path(f"/proc/{pid}"): command for pid, command in app.leftovers().items()}


def test_no_answer_log_command_line_or_metric_holds_a_secret(
    tiny_nano: Path, tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The password is in a file of settings; the key is in a file for the command line."""
    home = tmp_path / "home"
    home.mkdir()
    with fresh_database(postgres_url) as database:
        (tmp_path / "app.yaml").write_text(
            json.dumps(
                {
                    "checkpoint": str(tiny_nano),
                    "jobs": {"database": database},
                    "auth": {"enabled": True},
                    "media": {"directory": str(tmp_path / "media")},
                }
            )
        )

        def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "deployments", *arguments]
            there = environment() | {"HOME": str(home)} | variables
            return subprocess.run(command, cwd=tmp_path, env=there, capture_output=True, text=True, timeout=DEADLINE_S)

        added = run("keys", "add", "tester", "--config", "app.yaml")
        key = added.stdout.strip()
        assert re.fullmatch(r"c3_\w+_.+", key), added.stderr
        (tmp_path / "key").write_text(key)
        shown = [added.stderr]
        with serving(tmp_path, "--config", "app.yaml", "--num-cpus", "5", variables={"HOME": str(home)}) as app:
            url = app.url()
            token = (home / ".ray" / "auth_token").read_text()
            secrets = {
                "the key": key,
                "its secret part": key.split("_", 2)[2],
                "the password": PASSWORD,
                "the quoted password": urllib.parse.quote(PASSWORD, safe=""),
                "Ray's token": token,
            }
            assert all(len(secret) > 5 for secret in secrets.values())
            _crawl(url, key, shown)
            for arguments in (
                ("generate", "--url", url, "--api-key-file", "key", "--prompt", "A car.", "--steps", "x"),
                ("generate", "--url", url, "--prompt", "A car."),
                ("check", "--url", url, "--api-key-file", "key"),
                ("keys", "list", "--config", "app.yaml"),
            ):
                done = run(*arguments)
                shown += [done.stdout, done.stderr]
            commands = _read_commands(app)
            assert len(commands) > 10
            (session,) = set(re.findall(r"(/\S+/session_[^/ ]+)/logs", " ".join(commands.values())))
            found = _read_tree(Path(session))
            assert any("Ingress" in path.name for path in found), "the logs of Serve are among them"
            shown.append(app.said())
        for text in shown:
            assert not _find(secrets, text), text
        for path, text in (commands | found).items():
            assert not _find(secrets, text), path
