"""Sends Schemathesis' cases of the OpenAPI document to an API and checks that each answer is documented and safe."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx2
import requests
import schemathesis
from hypothesis import strategies as st
from hypothesis.internal.conjecture import junkdrawer
from schemathesis.checks import load_all_checks
from schemathesis.core.transport import Response
from schemathesis.generation import GenerationMode
from schemathesis.generation.drivers import CoverageGenerator
from schemathesis.generation.feedback import NO_FEEDBACK
from schemathesis.generation.overrides import Override
from schemathesis.specs.openapi import checks
from schemathesis.transport.serialization import Binary

from deployments.api.fields import Endpoint
from tests.api.hostile.byte_api import Sent
from tests.api.hostile.fuzzing import ByteEndpoint
from tests.mode_inputs import mp4, png

# Hypothesis would have Python code run within every garbage collection, from its first case on until the process ends.
# Before Python 3.11.8 and 3.12.2 that breaks pytest (INTERNALERROR, AST constructor recursion depth mismatch, CPython's
# issue 106905): reading the source of a failed test collects garbage, and another thread formats a traceback meanwhile.
# The callback only makes deadlines more exact, and there are none here.
junkdrawer._gc_initialized = True

MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
"""Cases that the document allows, and such that it forbids."""

EVENTS = "/v1/videos/{video_id}/events"

_MAKING = tuple(f"POST {endpoint}" for endpoint in Endpoint)
_CHECKS = (
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
    checks.allow_header_conformance,
    checks.missing_required_header,
)
_CHECKS_OF_CHAINS = (checks.use_after_free, checks.ensure_resource_availability)
# What the document cannot express: which fields go together, and what a text must contain.
_REFUSED = ("invalid_field", "not_offered")
_KINDS_OF_EVENTS = [
    *("queued", "started", "step", "preview", "previews_off", "file", "decoding", "retried"),
    *("completed", "failed", "cancelled", "deleted"),
]
# Fields that need others or another mode, or hold a file; every other field is accepted alone.
_NEEDY = {
    *("image", "video", "input_reference", "input_references", "image_reference", "video_reference"),
    *("width", "height", "size", "num_frames", "seconds", "output", "output_quality", "output_compression"),
    *("mode", "action_mode", "condition_frame_indexes_vision", "condition_video_keep", "actions", "action"),
    *("action_chunk_size", "domain_name", "domain_id", "raw_action_dim", "view_point"),
    *("resolution_tier", "resolution", "image_size", "extra_params", "guidance_interval"),
}
# Schemathesis takes a stream's schema for that of one event.
_EVENT = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": _KINDS_OF_EVENTS},
        "id": {"type": "string", "pattern": "^[1-9][0-9]*$"},
        "data": {"type": "string", "pattern": r"^\{.*\}$"},
    },
    "additionalProperties": False,
}
# Share of the cases about one job that repeat an earlier idempotency key.
_REPEATED = 8


class Jobs(Protocol):
    """Jobs that cases can be about, see :class:`tests.api.known_jobs.KnownJobs`."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of jobs."""
        ...

    def find_id(self, kind: str) -> str:
        """Return the id of a job of this kind."""
        ...


@dataclass
class CaseSender:
    """Sends cases to one API and counts the answers.

    Attributes:
        api: receives the cases.
        schema: Schemathesis' schema of its document, without fields for files.
        schema_with_files: the same with them.
        jobs: jobs of the API.
        statuses: (operation, mode, status) -> number of cases.
    """

    api: ByteEndpoint
    schema: Any
    schema_with_files: Any
    jobs: Jobs
    statuses: Counter[tuple[str, str, int]] = field(default_factory=Counter)

    @classmethod
    def of(cls, api: ByteEndpoint, document: dict[str, Any], jobs: Jobs) -> CaseSender:
        """Make one for an API from its document or a part of it."""
        load_all_checks()
        without_examples = _drop_examples(document)
        schema, schema_with_files = (
            schemathesis.openapi.from_dict(it) for it in (_drop_files(without_examples), without_examples)
        )
        return cls(api, schema, schema_with_files, jobs)

    @property
    def operations(self) -> dict[str, Any]:
        """Operations by method and path."""
        return _by_label(self.schema)

    def strategy(self, label: str, mode: GenerationMode) -> st.SearchStrategy[Any]:
        """Return the strategy that draws an operation's cases."""
        schema = self.schema_with_files if mode is GenerationMode.POSITIVE else self.schema
        strategy: st.SearchStrategy[Any] = _by_label(schema)[label].as_strategy(generation_mode=mode)
        return strategy

    @property
    def num_sent(self) -> int:
        """Number of cases so far."""
        return sum(self.statuses.values())

    def num_accepted(self, label: str) -> int:
        """Share of an operation's valid cases that were accepted."""
        return sum(
            count
            for (of, mode, status), count in self.statuses.items()
            if (of, mode) == (label, "positive") and status < 300
        )

    def send(self, case: Any, kind: str) -> None:
        """Send a case.

        Args:
            case: Schemathesis'.
            kind: of the job that the case is about, if any.

        Raises:
            AssertionError, Exception: the answer is unsafe or undocumented.
        """
        case.freeze_metadata()  # the code below must not change the case
        if case.meta.generation.mode is GenerationMode.POSITIVE:
            self._make_valid(case, kind)
        self.judge(case, self.exchange(case))

    def exchange(self, case: Any) -> httpx2.Response:
        """Send a case; return the answer."""
        return self.api.exchange(encode_case(case))

    def judge(self, case: Any, answer: Any, recorder: Any = None) -> None:
        """Check an answer against the document.

        Args:
            case: the case that it answers.
            answer: httpx2's or Schemathesis'.
            recorder: the earlier cases of a chain.
        """
        mode = case.meta.generation.mode.value
        self.statuses[case.operation.label, mode, answer.status_code] += 1
        selected = [*_CHECKS, *(_CHECKS_OF_CHAINS if recorder is not None else ())]
        if case.operation.path == Endpoint.SYNC:
            # GET and DELETE are allowed there: they name a job "sync", which does not exist.
            selected.remove(checks.unsupported_method)
            selected.remove(checks.allow_header_conformance)
        if answer.status_code == 413:  # a refusal too, which Schemathesis does not know as one
            selected.remove(checks.negative_data_rejection)
        case.validate_response(answer, checks=selected, recorder=recorder)
        if mode == "positive" and answer.status_code in (400, 422):
            error = answer.json()["error"]
            assert error["code"] in _REFUSED, (encode_case(case), error)
            assert not _is_independent(case), (encode_case(case), error)

    def _make_valid(self, case: Any, kind: str) -> None:
        """Repair what the document cannot express, so that the case is accepted."""
        if "video_id" in case.path_parameters:
            case.path_parameters["video_id"] = self.jobs.find_id(kind)
        if "name" in case.path_parameters:
            known = {"owner": "nvidia", "name": "Cosmos3-Nano"}
            case.path_parameters |= {name: known[name] for name in case.path_parameters}
        if "after" in case.query:
            case.query["after"] = self.jobs.find_id(kind)
        key = case.headers.get("Idempotency-Key")
        if key is not None and self.num_sent % _REPEATED:
            case.headers["Idempotency-Key"] = f"{key[:100]}{self.num_sent}"
        if case.operation.label in _MAKING and isinstance(case.body, dict):
            case.body.setdefault("prompt", "a red car")


def _is_independent(case: Any) -> bool:
    """Whether a body has a prompt and one field that the document describes completely."""
    if case.operation.label not in _MAKING or not isinstance(case.body, dict):
        return False
    prompt = case.body.get("prompt")
    fields = set(case.body) - {"prompt"}
    return isinstance(prompt, str) and bool(prompt.strip()) and len(fields) == 1 and not fields & _NEEDY


def _by_label(schema: Any) -> dict[str, Any]:
    found = (it.ok() for it in schema.get_all_operations())
    return {it.label: it for it in found}


def encode_case(case: Any) -> Sent:
    """Return a case as it is sent."""
    written = case.as_transport_kwargs(base_url="http://cosmos3")
    names = ("method", "url", "headers", "params", "data", "json", "files", "cookies")
    prepared = requests.Request(**{name: written[name] for name in names if name in written}).prepare()
    headers = tuple((_bytes(name), _bytes(value)) for name, value in prepared.headers.items())
    body: Any = prepared.body
    return Sent(str(prepared.method), prepared.path_url, headers, (_bytes(body),) if body else ())


def files() -> st.SearchStrategy[Any]:
    """Draw contents of file parts: pictures, truncated clips, any bytes."""
    return (st.sampled_from([png(), png(), mp4()[:2000]]) | st.binary(max_size=100)).map(Binary)


def iterate_bounds(operation: Any) -> Iterator[Any]:
    """Yield cases at, below and above each bound of the document."""
    return iter(
        CoverageGenerator(
            operation=operation,
            generation_modes=list(MODES),
            generation_config=operation.schema.config.generation_for(operation=operation, phase="coverage"),
            auth_storage=None,
            override=Override(),
            feedback=NO_FEEDBACK,
        )
    )


def make_chains(sender: CaseSender, on_begin: Callable[[], None]) -> type[Any]:
    """Make a state machine whose cases use what earlier ones created.

    Args:
        sender: sends them.
        on_begin: callback before each chain.
    """
    machine: type[Any] = sender.schema.as_state_machine()

    class Chained(machine):  # type: ignore[misc]
        def setup(self) -> None:
            on_begin()

        def call(self, case: Any, **_: Any) -> Response:
            return Response.from_any(sender.exchange(case))

        def validate_response(self, response: Response, case: Any, *_: Any, **__: Any) -> None:
            sender.judge(case, response, self.recorder)

    return Chained


def _drop_examples(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document without examples: Schemathesis would vary those instead of drawing values."""
    document = copy.deepcopy(document)
    for item in document["paths"].values():
        for operation in item.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                content.pop("example", None)
    responses = document["paths"][EVENTS]["get"]["responses"]["200"]["content"]
    responses["text/event-stream"]["schema"] = _EVENT
    return document


def _drop_files(document: dict[str, Any]) -> dict[str, Any]:
    """Drop the fields for files: Schemathesis 4.32 sometimes fails to make invalid bodies with them."""
    document = copy.deepcopy(document)
    for schema in document["components"]["schemas"].values():
        properties = schema.get("properties", {})
        for name in [name for name, it in properties.items() if it.get("format") == "binary"]:
            del properties[name]
    return document


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()
