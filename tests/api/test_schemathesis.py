"""Whatever the OpenAPI document allows, and what it forbids, asked by Schemathesis.

In `make test` the cases are always the same; in the long tier all of those at bounds are tried, and others are drawn
with a seed that is printed.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.formats import unregister_string_format

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.presets import LIMITS
from deployments.api.fields import Endpoint
from deployments.api.service_info import OPEN_PATHS
from tests.api.accepting_api import AcceptingApi, Sent, answer_of
from tests.api.asking import EVENTS, MODES, Asking, bounds_of, chained, files, sent_of
from tests.api.fake_service import Api
from tests.api.known_jobs import KnownJobs

SEED = "COSMOS3_TEST_SEED"
"""The variable that repeats a run of the long tier."""

_ONE = "/v1/videos/{video_id}"
MAKING = tuple(f"POST {endpoint}" for endpoint in Endpoint)
OPERATIONS = (
    *MAKING,
    "GET /v1/videos",
    *(f"{method} {_ONE}" for method in ("GET", "DELETE")),
    *(f"POST {_ONE}/{verb}" for verb in ("cancel", "remix")),
    *(f"{method} {_ONE}/content" for method in ("GET", "HEAD")),
    f"GET {EVENTS}",
    *(f"GET {path}" for path in ("/v1/models", "/health", "/ready", "/metrics", "/openapi.json")),
)
# One way to write each body is tried in `make test`, another for each operation.
_KINDS = {
    Endpoint.VIDEOS: "multipart/form-data",
    Endpoint.SYNC: "application/json",
    Endpoint.IMAGES: "application/x-www-form-urlencoded",
    f"{_ONE}/remix": "application/json",
}
_EVERY = 20
_IDLE = "not offered|without effect"


@pytest.fixture(scope="module", autouse=True)
def real_files() -> Iterator[None]:
    schemathesis.openapi.format("binary", files())
    yield
    unregister_string_format("binary")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, empty_database: Path, layout: CheckpointLayout) -> Iterator[Any]:
    api = AcceptingApi(tmp_path_factory.mktemp("schemathesis"), empty_database, layout)
    yield api
    api.close()


@pytest.fixture(scope="module")
def document(api: AcceptingApi) -> dict[str, Any]:
    told: dict[str, Any] = api.answer(Sent("GET", "/openapi.json")).json()
    return told


@pytest.fixture(scope="module")
def asking(api: AcceptingApi, document: dict[str, Any]) -> Asking:
    return Asking.of(api, narrowed(document), KnownJobs(api))


@pytest.fixture(scope="module")
def asking_all(api: AcceptingApi, document: dict[str, Any]) -> Asking:
    return Asking.of(api, document, KnownJobs(api))


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """With one way to write each body, each field that has an effect once, and without the longest texts."""
    document = json.loads(json.dumps(document).replace(str(LIMITS.max_prompt_chars), "1000"))
    for path, kind in _KINDS.items():
        body = document["paths"][path]["post"]["requestBody"]
        body["content"] = {kind: body["content"][kind]}
    for schema in document["components"]["schemas"].values():
        properties = schema.get("properties", {})
        properties.pop("extra_params", None)
        idle = [name for name, it in properties.items() if re.match(_IDLE, it.get("description", ""))]
        for name in idle[3:]:
            del properties[name]
    return document


def ask_generated(asking: Asking, label: str, num_examples: int, seed: int | None) -> None:
    """Have Hypothesis draw cases.

    Args:
        asking: sends them.
        label: of the operation.
        num_examples: that the document allows, and the same number that it forbids.
        seed: None for always the same.
    """
    operation = asking.operations[label]
    takes_something = bool([*operation.iter_parameters(), *operation.body])
    for mode in MODES if takes_something else MODES[:1]:

        @hypothesis.settings(
            max_examples=num_examples,
            deadline=None,  # of a machine that others use as well
            database=None,
            derandomize=seed is None,
            suppress_health_check=list(hypothesis.HealthCheck),  # these strategies are large and filter a lot
            phases=[hypothesis.Phase.generate],  # a failure is told as it is: to make it smaller takes minutes
        )
        @hypothesis.given(case=asking.strategy(label, mode), kind=st.sampled_from(asking.known.kinds))
        def ask(case: Any, kind: str) -> None:
            asking.ask(case, kind)

        (ask if seed is None else hypothesis.seed(seed)(ask))()


def ask_bounds(asking: Asking, label: str, every: int) -> None:
    """Ask one of so many cases at the bounds of an operation; those about a job about one of each kind."""
    for case in itertools.islice(bounds_of(asking.operations[label]), 0, None, every):
        is_about_one = "video_id" in case.path_parameters and case.meta.generation.mode is GenerationMode.POSITIVE
        for kind in asking.known.kinds if is_about_one else ("completed",):
            asking.ask(case, kind)


def test_every_operation_is_asked(asking: Asking) -> None:
    assert set(asking.operations) == set(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
def test_bounds(label: str, asking: Asking) -> None:
    before, accepted = asking.num_asked, asking.num_accepted(label)
    ask_bounds(asking, label, _EVERY if label in MAKING else 1)
    assert asking.num_asked > before + 5
    assert asking.num_accepted(label) > accepted, "some are accepted"


@pytest.mark.parametrize(
    "label", [*MAKING, "GET /v1/videos", f"POST {_ONE}/remix", f"GET {_ONE}/content", f"GET {EVENTS}"]
)
def test_generated(label: str, asking: Asking) -> None:
    ask_generated(asking, label, 3, seed=None)


def test_hypothesis_leaves_the_garbage_collector_alone(asking: Asking) -> None:
    ask_generated(asking, "GET /health", 1, seed=None)
    assert not [it for it in gc.callbacks if "hypothesis" in getattr(it, "__module__", "")]


def test_without_a_key_nothing_is_done(asking: Asking, make_api: Callable[..., Api]) -> None:
    """Cases that are accepted where everybody may call."""
    guarded = make_api(needs_keys=True)
    for label, operation in asking.operations.items():
        case = next(bounds_of(operation))
        asking.ask(case, "completed")
        sent = sent_of(case)
        for key in (None, b"Bearer c3_0000000000000000_" + b"0" * 43, b"Basic YTpi"):
            headers = sent.headers if key is None else (*sent.headers, (b"authorization", key))
            answer = guarded.run(answer_of(guarded.app, replace(sent, headers=headers)))
            assert answer.status_code == (200 if operation.path in OPEN_PATHS else 401), label
            guarded.documented.check(answer)
    assert guarded.director.submitted == []


@pytest.fixture
def seed() -> int:
    seed = int(os.environ.get(SEED, random.SystemRandom().randrange(2**32)))
    print(f"{SEED}={seed} repeats this")
    return seed


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("label", OPERATIONS)
def test_all_bounds(label: str, asking_all: Asking) -> None:
    ask_bounds(asking_all, label, 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("label", OPERATIONS)
def test_many_generated(label: str, asking_all: Asking, seed: int) -> None:
    ask_generated(asking_all, label, 200, seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_chains(api: AcceptingApi, asking_all: Asking, seed: int) -> None:
    """What was made can be asked for until it is deleted, and not any more then."""
    before = asking_all.num_asked
    machine = hypothesis.seed(seed)(chained(asking_all, api.tidy))
    settings = hypothesis.settings(
        max_examples=100,
        stateful_step_count=8,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    run_state_machine_as_test(machine, settings=settings)
    assert asking_all.num_asked > before + 100
