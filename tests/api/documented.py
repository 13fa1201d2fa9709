"""Checks that an answer is one that the OpenAPI document allows."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx2
import jsonschema

from cosmos3_core.errors import Cosmos3Error

_SENT = ("Retry-After", "WWW-Authenticate", "Content-Range", "ETag", "X-Model", "X-Warnings")


class UndocumentedAnswer(Cosmos3Error):
    """The document does not describe this answer."""


class ApiDocument:
    """An OpenAPI document that answers are checked against.

    Args:
        document: the API's.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self._validators: dict[str, Any] = {}
        self._paths = [
            (re.compile(re.sub(r"\{[a-z_]+\}", "[^/]+", path)), item) for path, item in document["paths"].items()
        ]

    def operation(self, method: str, path: str) -> dict[str, Any] | None:
        """Find a request's operation, or None; paths without a parameter come first."""
        found = [item for pattern, item in self._paths if pattern.fullmatch(path)]
        exact = self.document["paths"].get(path)
        for item in ([exact] if exact else []) + found:
            if method.lower() in item:
                operation: dict[str, Any] = item[method.lower()]
                return operation
        return None

    def resolve(self, value: dict[str, Any]) -> dict[str, Any]:
        """Return a reference's target, or the schema itself."""
        while "$ref" in value:
            target: Any = self.document
            for name in value["$ref"].removeprefix("#/").split("/"):
                target = target[name]
            value = target
        return value

    def is_valid(self, schema: dict[str, Any], value: Any) -> bool:
        """Whether a schema of the document allows a value."""
        validator: bool = self._validator(schema).is_valid(value)
        return validator

    def check(self, answer: httpx2.Response) -> None:
        """Check an answer.

        Raises:
            Undocumented: the document does not describe it.
            jsonschema.ValidationError: its body does not match the schema.
        """
        method, path = answer.request.method, answer.request.url.path
        operation = self.operation(method, path)
        if operation is None:
            if answer.status_code not in (200, 401, 403, 404, 405):
                raise UndocumentedAnswer(f"{method} {path}: {answer.status_code}")
            return
        response = operation["responses"].get(str(answer.status_code))
        if response is None:
            if answer.status_code < 500:
                raise UndocumentedAnswer(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
            response = operation["responses"]["default"]
        response = self.resolve(response)
        for name in response.get("headers", {}):
            # Only a conflict that resolves itself has Retry-After.
            is_needed = name in _SENT and (answer.status_code != 409 or path.endswith("/content"))
            if is_needed and name not in answer.headers:
                raise UndocumentedAnswer(f"{method} {path}: {answer.status_code} without {name}")
        if method == "HEAD" or answer.status_code in (204, 304):
            return
        kind = answer.headers["content-type"].partition(";")[0]
        if kind not in response["content"]:
            raise UndocumentedAnswer(f"{method} {path}: {answer.status_code} as {kind}")
        if kind == "application/json":
            self._validator(response["content"][kind]["schema"]).validate(answer.json())

    def _validator(self, schema: dict[str, Any]) -> Any:
        key = json.dumps(schema)
        if key not in self._validators:
            whole = {**schema, "components": self.document["components"]}
            self._validators[key] = jsonschema.Draft202012Validator(whole)
        return self._validators[key]
