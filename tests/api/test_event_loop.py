"""Large bodies are parsed in threads, so that the event loop keeps answering."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from deployments.api import body_reader, call, field_types
from deployments.api.fields import Endpoint
from tests.api.fake_service import Api
from tests.api.test_remote_references import Remote
from tests.mode_inputs import RED_PNG, data_url


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[threading.Thread]]:
    """Name of a function -> threads that it has run in."""
    seen: dict[str, set[threading.Thread]] = {}

    def watch(module: Any, name: str) -> None:
        work: Callable[..., Any] = getattr(module, name)

        def note(*arguments: Any, **more: Any) -> Any:
            seen.setdefault(name, set()).add(threading.current_thread())
            return work(*arguments, **more)

        monkeypatch.setattr(module, name, note)

    watch(field_types, "_decode")
    watch(field_types, "_text_of")
    watch(body_reader, "_unique_keys")
    watch(call, "parse_body")
    return seen


@pytest.mark.parametrize("path", [Endpoint.VIDEOS, Endpoint.SYNC])
@pytest.mark.parametrize("is_form", [False, True])
@pytest.mark.parametrize("fetches", [False, True])
def test_bodies_are_parsed_outside_the_event_loop(
    path: str, is_form: bool, fetches: bool, make_api: Callable[..., Api], threads: dict[str, set[threading.Thread]]
) -> None:
    api = make_api(fetch_file=Remote().fetch if fetches else None)
    fields = {
        "prompt": "a",
        "image_reference": json.dumps({"image_url": data_url(RED_PNG)}),
        "extra_params": json.dumps({"action_mode": "forward_dynamics", "domain_name": "av", "num_frames": 3}),
        "actions": json.dumps([[0.0] * 9] * 2),
    }
    answer = api.post(path, **{"data" if is_form else "json": fields})
    assert answer.status_code == 200, answer.text
    assert threads.keys() == {"_decode", "_text_of", "_unique_keys", "parse_body"}
    assert threading.main_thread() not in set().union(*threads.values())


def test_image_fields_are_parsed_outside_the_event_loop(api: Api, threads: dict[str, set[threading.Thread]]) -> None:
    body = {"prompt": "a", "extra_params": '{"seed": 3}'}
    assert api.post(Endpoint.IMAGES, json=body).status_code == 200
    assert threads.keys() == {"_unique_keys", "parse_body"}
    assert threading.main_thread() not in set().union(*threads.values())
