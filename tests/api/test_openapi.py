"""The OpenAPI document is complete and true; every answer in these tests is checked against it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest

from deployments.api.app import _EXPOSED_HEADERS
from deployments.api.body_reader import FormText
from deployments.api.field_types import MEDIA
from deployments.api.fields import BODIES, Endpoint
from deployments.media.variants import CONTENT_VARIANTS
from tests.api.documented import ApiDocument
from tests.api.fake_service import CLASSES, Api
from tests.api.test_fields import REQUESTS

JSON, MULTIPART, URLENCODED = "application/json", "multipart/form-data", "application/x-www-form-urlencoded"


@pytest.fixture
def documented(shared_api: Api) -> ApiDocument:
    return ApiDocument(shared_api.get("/openapi.json").json())


def body_of(documented: ApiDocument, endpoint: str, kind: str = JSON) -> dict[str, Any]:
    content = documented.document["paths"][endpoint]["post"]["requestBody"]["content"]
    schema: dict[str, Any] = content[kind]["schema"]
    return schema


def test_the_document_has_exactly_the_routes(documented: ApiDocument, shared_api: Api) -> None:
    routes = {
        (method.lower(), route.path)
        for router in shared_api.app.router.routes
        for route in getattr(getattr(router, "original_router", None), "routes", [])
        for method in route.methods
    }
    assert len(routes) > 10
    documented_routes = {(method, path) for path, item in documented.document["paths"].items() for method in item}
    assert documented_routes == routes


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for it in value.values():
            yield from references(it)
    elif isinstance(value, list):
        for it in value:
            yield from references(it)


def test_every_reference_resolves_and_every_component_is_used(documented: ApiDocument) -> None:
    used = set(references(documented.document))
    for reference in used:
        documented.resolve({"$ref": reference})
    assert {f"#/components/schemas/{name}" for name in documented.document["components"]["schemas"]} == used


def test_every_schema_is_valid(documented: ApiDocument) -> None:
    for schema in documented.document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_each_operation_lists_its_errors(documented: ApiDocument) -> None:
    for path, item in documented.document["paths"].items():
        for method, operation in item.items():
            assert operation["operationId"]
            assert operation["summary"]
            responses = operation["responses"]
            assert "default" in responses
            if path.startswith("/v1/"):
                assert {"401", "429", "503"} <= set(responses), (method, path)
            if "requestBody" in operation:
                assert {"400", "403", "408", "413", "415", "422", "504"} <= set(responses), path
            if "{video_id}" in path:
                assert "404" in responses
                assert operation["parameters"][0]["name"] == "video_id"
    names = [op["operationId"] for item in documented.document["paths"].values() for op in item.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("kind", [JSON, MULTIPART, URLENCODED])
@pytest.mark.parametrize("endpoint", Endpoint)
def test_the_document_has_every_field(endpoint: Endpoint, kind: str, documented: ApiDocument) -> None:
    schema = documented.resolve(body_of(documented, endpoint, kind))
    model = BODIES[endpoint]
    names = {*model.model_fields, *model.aliases(), *model.no_effect, *model.not_offered}
    named = {name for name in names if "*" not in name}
    assert set(schema["properties"]) == named
    assert len(schema["patternProperties"]) == len(names) - len(named)
    files = {name for name, it in schema["properties"].items() if it.get("format") == "binary"}
    assert files == (set() if kind == JSON else set(MEDIA) & named)
    assert schema["properties"]["model"]["description"]


def test_the_document_follows_the_configuration(make_api: Callable[..., Api]) -> None:
    def fields(api: Api) -> dict[str, Any]:
        schemas = api.get("/openapi.json").json()["components"]["schemas"]
        properties: dict[str, Any] = schemas["VideoBody"]["properties"]
        return properties

    strict, lax = make_api(), make_api(may_disable_guardrails=True, needs_keys=True)
    assert fields(strict)["service_class"]["anyOf"][0]["enum"] == list(CLASSES)
    assert fields(strict)["model"]["anyOf"][0]["enum"] == ["nano", "nvidia/nano", "nvidia/Cosmos3-Nano", "Cosmos3-Nano"]
    assert fields(strict)["guardrails"]["anyOf"][0]["enum"] == [True]
    assert fields(lax)["guardrails"]["anyOf"][0]["enum"] == [True, False]
    without = make_api(has_guardrails=False, may_disable_guardrails=True)
    assert fields(without)["guardrails"]["anyOf"][0]["enum"] == [False]
    assert strict.get("/openapi.json").json()["security"] == []
    assert lax.get("/openapi.json").json()["security"] == [{"apiKey": []}]


SENT: list[tuple[dict[str, Any], bool]] = [
    ({"prompt": "a"}, True),
    ({"prompt": None}, True),
    ({"prompt": 5}, False),
    ({"num_frames": 1202}, False),
    ({"num_frames": 0}, False),
    ({"num_frames": "5"}, False),
    ({"num_inference_steps": 1001}, False),
    ({"guidance_scale": 20.5}, False),
    ({"guidance_interval": [400, 1000]}, True),
    ({"guidance_interval": "400,1000"}, True),
    ({"guidance_interval": [400]}, False),
    ({"guidance_interval": "some"}, False),
    ({"seed": -1}, False),
    ({"seed": 2**63 - 1}, True),
    ({"seed": 2**63}, False),
    ({"size": "64x32"}, True),
    ({"size": "64"}, False),
    ({"height": 40, "width": 40}, False),
    ({"height": 8, "width": 32}, False),
    ({"seconds": "1.5", "fps": 8}, True),
    ({"seconds": 2}, True),
    ({"seconds": 0}, False),
    ({"seconds": "soon", "num_frames": 5}, False),
    ({"fps": 0.5}, False),
    ({"mode": "text_to_text"}, False),
    ({"crf": 52}, False),
    ({"quality": "best"}, False),
    ({"service_class": "urgent"}, False),
    ({"priority": "batch"}, True),
    ({"model": "sora-2"}, False),
    ({"guardrails": False}, False),
    ({"guardrails": True}, True),
    ({"lora": None}, True),
    ({"lora": {}}, False),
    ({"extra_params": {"lora": {}}}, False),
    ({"extra_params": {"video_noise_mask": 1}}, False),
    ({"user": {"a": [1]}}, True),
    ({"extra_params": {"max_sequence_length": 4096, "frame_interpolation_exp": 1}}, True),
    ({"extra_params": '{"seed": 3}'}, True),
    ({"extra_params": "seed"}, False),
    ({"extra_params": [1]}, False),
    ({"extra_params": {"extra_params": {}}}, False),
    ({"extra_params": {"num_frames": 2000}}, False),
    ({"promt": "a"}, False),
    ({"condition_frame_indexes_vision": -1}, False),
    ({"output": "gif"}, False),
    ({"previews": 33}, False),
    ({"image": []}, False),
    ({"image": ""}, False),
    ({"image": 5}, False),
    ({"image": {"a": "b", "c": "d"}}, False),
    ({"domain_id": -1}, False),
]


def test_schemas_agree_with_the_api_on_valid_and_invalid_bodies(documented: ApiDocument, api: Api) -> None:
    for body, is_valid in SENT:
        assert documented.is_valid(body_of(documented, Endpoint.VIDEOS), body) is is_valid, body
        sent = {"prompt": "a", **body}
        answer = api.post("/v1/videos", json=sent)
        assert answer.status_code == (200 if is_valid and sent["prompt"] else 422), (body, answer.text)


@pytest.mark.parametrize(("form", "mode", "expected"), REQUESTS, ids=lambda value: str(value)[:40])
def test_schemas_accept_vllm_omnis_requests(
    form: dict[str, Any], mode: str, expected: dict[str, Any], documented: ApiDocument
) -> None:
    """The forms are sent as JSON bodies, in which numbers are numbers."""
    model = BODIES[Endpoint.VIDEOS]
    body = {
        name: model.type_of(name).normalize(name, FormText(value)) if name in model.model_fields else value
        for name, value in form.items()
    }
    assert documented.is_valid(body_of(documented, Endpoint.VIDEOS), body), body


@pytest.mark.parametrize("endpoint", Endpoint)
def test_every_example_is_accepted(endpoint: Endpoint, documented: ApiDocument, api: Api) -> None:
    content = documented.document["paths"][endpoint]["post"]["requestBody"]["content"]
    for kind in (JSON, MULTIPART, URLENCODED):
        example = content[kind]["example"]
        assert documented.is_valid(content[kind]["schema"], example)
        texts = {name: str(value) for name, value in example.items()}
        files = {name: (None, text) for name, text in texts.items()}
        sent: dict[str, Any] = {JSON: {"json": example}, MULTIPART: {"files": files}, URLENCODED: {"data": texts}}
        assert api.post(endpoint, **sent[kind]).status_code == 200


def test_values_beyond_documented_bounds_are_refused(documented: ApiDocument, shared_api: Api) -> None:
    properties = documented.resolve(body_of(documented, Endpoint.VIDEOS))["properties"]
    tested = 0
    for name in BODIES[Endpoint.VIDEOS].model_fields:
        schema = properties[name].get("anyOf", [{}])[0]
        for bound, step in (("minimum", -1), ("maximum", 1)):
            if bound not in schema or name in ("domain_id", "raw_action_dim", "action_chunk_size"):
                continue  # fields of some modes only
            assert shared_api.post("/v1/videos", json={"prompt": "a", name: schema[bound] + step}).status_code == 422
            tested += 1
        if "enum" in schema and schema.get("type") == "string":
            assert shared_api.post("/v1/videos", json={"prompt": "a", name: "zzz"}).status_code == 422
            tested += 1
    assert tested > 25


def test_variants_and_headers_match_the_code(documented: ApiDocument) -> None:
    content = documented.document["paths"]["/v1/videos/{video_id}/content"]["get"]
    (variant,) = (it for it in content["parameters"] if it["name"] == "variant")
    assert tuple(variant["schema"]["enum"]) == CONTENT_VARIANTS
    operations = [operation for item in documented.document["paths"].values() for operation in item.values()]
    answers = [answer for operation in operations for answer in operation["responses"].values()]
    names = {name.lower() for answer in answers for name in answer.get("headers", {})}
    assert len(names) > 10
    assert names - {"www-authenticate"} <= set(_EXPOSED_HEADERS)


def test_a_prefix_is_in_the_servers_url(shared_api: Api) -> None:
    from deployments.api.openapi import make_document

    assert make_document(shared_api.app, shared_api.service, "/app")["servers"] == [{"url": "/app"}]
    assert make_document(shared_api.app, shared_api.service)["servers"] == [{"url": "/"}]
    json.dumps(make_document(shared_api.app, shared_api.service))
