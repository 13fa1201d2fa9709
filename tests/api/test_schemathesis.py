"""Whatever the OpenAPI document allows, and what it forbids, is asked by Schemathesis; answers are those that it has.

In `make test` the cases are always the same; those of the long tier are drawn with a seed that a failure tells.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis.checks import load_all_checks
from schemathesis.generation import GenerationMode
from schemathesis.generation.drivers import CoverageGenerator
from schemathesis.generation.feedback import NO_FEEDBACK
from schemathesis.generation.overrides import Override
from schemathesis.specs.openapi import checks
from schemathesis.specs.openapi.formats import unregister_string_format
from schemathesis.transport.serialization import Binary

from cosmos3_core.checkpoint.layout import CheckpointLayout
from deployments.jobs.keys import NewKey
from tests.api.accepting_api import AcceptingApi, Sent
from tests.api.known_jobs import KnownJobs, mp4, png

SEED = "COSMOS3_TEST_SEED"
"""Names the variable that repeats a run of the long tier."""

_CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
    checks.allow_header_conformance,
    checks.missing_required_header,
]
_MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
_MAKING = ("POST /v1/videos", "POST /v1/videos/sync", "POST /v1/images/generations")
_ABOUT_ONE = "/v1/videos/{video_id}"
OPERATIONS = (
    *_MAKING,
    "GET /v1/videos",
    f"GET {_ABOUT_ONE}",
    f"DELETE {_ABOUT_ONE}",
    f"POST {_ABOUT_ONE}/cancel",
    f"POST {_ABOUT_ONE}/remix",
    f"GET {_ABOUT_ONE}/content",
    f"HEAD {_ABOUT_ONE}/content",
    f"GET {_ABOUT_ONE}/events",
    "GET /v1/models",
    "GET /health",
    "GET /ready",
    "GET /metrics",
    "GET /openapi.json",
)
_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": ["queued", "started", "step", "file", "completed", "failed", "cancelled", "deleted"]},
        "id": {"type": "string", "pattern": "^[1-9][0-9]*$"},
        "data": {"type": "string", "pattern": r"^\{.*\}$"},
    },
    "additionalProperties": False,
}
# One way to write each body is tried in `make test`, another for each operation.
_KINDS = {
    "/v1/videos": "multipart/form-data",
    "/v1/videos/sync": "application/json",
    "/v1/images/generations": "application/x-www-form-urlencoded",
    f"{_ABOUT_ONE}/remix": "application/json",
}
# What the document cannot say: fields that do not go together, and texts that are not what they have to hold.
_REFUSED = ("invalid_field", "not_offered")


@dataclass
class Asking:
    """Sends cases of a document to an API and judges the answers.

    Attributes:
        api: that is asked.
        known: its jobs.
        operations: of the document, by method and path.
        statuses: how often each kind of case was answered how.
    """

    api: AcceptingApi
    known: KnownJobs
    operations: Mapping[str, Any]
    statuses: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    num_asked: int = 0

    @classmethod
    def of(cls, api: AcceptingApi, document: dict[str, Any]) -> Asking:
        schema = schemathesis.openapi.from_dict(fitted(document))
        found = [it.ok() for it in schema.get_all_operations()]
        return cls(api, KnownJobs(api), {it.label: it for it in found})

    def ask(self, case: Any, kind: str, *, key: str = "") -> httpx.Response:
        """Send a case.

        Args:
            case: Schemathesis's.
            kind: of the job that it is about, where it is about one.
            key: an API key.

        Raises:
            AssertionError: the answer is one that must not be, or that the document does not have.
        """
        self._about(case, kind)
        sent = sent_of(case)
        if key:
            sent = Sent(sent.method, sent.target, (*sent.headers, (b"authorization", f"Bearer {key}".encode())), sent.body)
        answer = self.api.answer(sent)
        mode = case.meta.generation.mode.value
        self.statuses[case.operation.label, mode, answer.status_code] += 1
        self.api.documented.check(answer)
        case.validate_response(answer, checks=_CHECKS)
        if mode == "positive" and answer.status_code in (400, 422):
            error = answer.json()["error"]
            assert error["code"] in _REFUSED, (sent, error)
        if len(self.api.director.asked) > 200:
            self.api.tidy(self.known.ids)
        return answer

    def _about(self, case: Any, kind: str) -> None:
        """Make it be about something that there is, where it means well."""
        self.num_asked += 1
        if case.meta.generation.mode is not GenerationMode.POSITIVE:
            return
        if "video_id" in case.path_parameters:
            case.path_parameters["video_id"] = self.known.id_of(kind)
        if "after" in case.query:
            case.query["after"] = self.known.id_of(kind)
        if "Idempotency-Key" in case.headers and self.num_asked % 8:
            # Most are no repetitions.
            case.headers["Idempotency-Key"] = f"{case.headers['Idempotency-Key'][:100]}{self.num_asked}"
        if case.operation.label in _MAKING and isinstance(case.body, dict):
            case.body.setdefault("prompt", "a red car")


def sent_of(case: Any) -> Sent:
    """A case as it goes over the wire."""
    written = case.as_transport_kwargs(base_url="http://cosmos3")
    names = ("method", "url", "headers", "params", "data", "json", "files", "cookies")
    prepared = requests.Request(**{name: written[name] for name in names if name in written}).prepare()
    body = prepared.body or b""
    headers = tuple((_bytes(name), _bytes(value)) for name, value in prepared.headers.items())
    return Sent(str(prepared.method), prepared.path_url, headers, (_bytes(body),) if body else ())


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1" if text.isascii() else "utf-8")


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """With one way to write each body."""
    document = copy.deepcopy(document)
    for path, item in document["paths"].items():
        for operation in item.values():
            if "requestBody" in operation:
                content = operation["requestBody"]["content"]
                operation["requestBody"]["content"] = {_KINDS[path]: content[_KINDS[path]]}
    return document


def fitted(document: dict[str, Any]) -> dict[str, Any]:
    """As Schemathesis needs it: without examples, all cases would be variations of them; with a schema of one event."""
    document = copy.deepcopy(document)
    for item in document["paths"].values():
        for operation in item.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                content.pop("example", None)
    told = document["paths"][f"{_ABOUT_ONE}/events"]["get"]["responses"]["200"]["content"]
    told["text/event-stream"]["schema"] = _EVENT
    return document


@pytest.fixture(scope="module", autouse=True)
def real_files() -> Iterator[None]:
    """File parts hold pictures now and then."""
    load_all_checks()
    files = st.sampled_from([png(), png(), mp4()[:2000]]) | st.binary(max_size=100)
    schemathesis.openapi.format("binary", files.map(Binary))
    yield
    unregister_string_format("binary")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, empty_database: Path, layout: CheckpointLayout) -> Iterator[Any]:
    api = AcceptingApi(tmp_path_factory.mktemp("schemathesis"), empty_database, layout)
    yield api
    api.close()


@pytest.fixture(scope="module")
def document(api: AcceptingApi) -> dict[str, Any]:
    told: dict[str, Any] = api.get("/openapi.json").json()
    return told


@pytest.fixture(scope="module")
def asking(api: AcceptingApi, document: dict[str, Any]) -> Asking:
    return Asking.of(api, narrowed(document))


@pytest.fixture(scope="module")
def asking_all(api: AcceptingApi, document: dict[str, Any]) -> Asking:
    return Asking.of(api, document)


def coverage_of(operation: Any) -> Iterator[Any]:
    """Cases at, below and above each bound that the document has, one after the other."""
    config = operation.schema.config.generation_for(operation=operation, phase="coverage")
    return iter(
        CoverageGenerator(
            operation=operation,
            generation_modes=_MODES,
            generation_config=config,
            auth_storage=None,
            override=Override(),
            feedback=NO_FEEDBACK,
        )
    )


def ask_generated(asking: Asking, label: str, num_examples: int, **settings: Any) -> None:
    """Have Hypothesis draw cases, half of which break the document."""
    operation = asking.operations[label]
    quiet = hypothesis.settings(
        max_examples=num_examples,
        deadline=None,  # two workers share the machine with others
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
        **settings,
    )
    takes_something = bool(list(operation.iter_parameters()) or list(operation.body))
    for mode in _MODES if takes_something else _MODES[:1]:

        @quiet
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode), kind=st.sampled_from(asking.known.kinds))
        def ask(case: Any, kind: str) -> None:
            asking.ask(case, kind)

        ask()


def test_every_operation_is_asked(asking: Asking) -> None:
    assert set(asking.operations) == set(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
def test_bounds(label: str, asking: Asking) -> None:
    kinds = itertools.cycle(asking.known.kinds)
    cases = coverage_of(asking.operations[label])
    for case in itertools.islice(cases, 0, None, 12 if label in _MAKING else 1):
        asking.ask(case, next(kinds))


@pytest.mark.parametrize("label", OPERATIONS)
def test_generated(label: str, asking: Asking) -> None:
    ask_generated(asking, label, 10, derandomize=True)
