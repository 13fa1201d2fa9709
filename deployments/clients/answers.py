"""What an app answers, checked: values of the types that the app itself has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from deployments.clients.errors import AnswerError
from deployments.jobs.events import VideoEvent, event_of_json

_M = TypeVar("_M", bound=BaseModel)


def read_answer(kind: type[_M], values: Any) -> _M:
    """Return an answer as a value of its type; keys that this version does not know are left out.

    Raises:
        AnswerError: it is no such answer.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        message = f"the app answers, but not as this API does ({what}); is it a cosmos3 app?"
        raise AnswerError(200, message) from None


def read_event(kind: str, data: Mapping[str, Any], seq: int | None = None) -> VideoEvent:
    """Return an event that came as JSON.

    Raises:
        AnswerError: it does not hold what its kind does.
    """
    try:
        return event_of_json(kind, data, seq)
    except ValueError:
        message = f"the app tells of {kind!r}, but not as this API does; is it a cosmos3 app?"
        raise AnswerError(200, message) from None
