"""Fields of a request body -> what it asks for: generation requests and their :class:`SubmitOptions`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from cosmos3_core import checks
from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.presets import LIMITS
from cosmos3_core.request import GenerationRequest
from deployments.api.body_limit import MAX_FIELDS
from deployments.api.fields import ImageBody, RequestBody, VideoBody, find_reason
from deployments.api.media_fields import find_media
from deployments.config import DEFAULT_CLASS
from deployments.failures import unwrap_error
from deployments.jobs.job import SubmitOptions

_MAX_SHOWN_CHARS = 200
# A value's own cost beside its characters.
_CHARS_PER_VALUE = 8
# Field of a request -> field of a body that it is computed from; and the one that it equals.
_COMPUTED_FROM = {"num_frames": "seconds", "width": "size", "height": "size", "lossless": "quality"}
_EQUAL_TO = {"output": "output_format", "output_quality": "output_compression"}

B = TypeVar("B", bound=RequestBody)
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class BodyRules:
    """Values that bodies may have, as the service and the caller allow.

    Attributes:
        model_name: name of the served model.
        classes: of the queue, that the caller may wait in.
        default_class: of bodies that name none.
        has_guardrails: whether requests are looked at.
        may_disable_guardrails: whether a caller may do without.
    """

    model_name: str
    classes: tuple[str, ...]
    default_class: str = DEFAULT_CLASS
    has_guardrails: bool = False
    may_disable_guardrails: bool = False


@dataclass(frozen=True)
class Origins:
    """Names of a request's fields in the body that it was made of.

    Attributes:
        names: field of the request -> field of the body, where that is another.
        computed: field of the request that is computed from one of the body -> the value of that.
    """

    names: dict[str, str]
    computed: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Name fields as the body does in errors that are raised inside, here or in another process.

        Raises:
            Exception: whatever was raised.
        """
        try:
            yield
        except Exception as error:  # what it wraps decides
            reason = unwrap_error(error)
            if not isinstance(reason, RequestError) or reason.field not in self.names:
                raise
            raise self._renamed(reason) from None

    def _renamed(self, reason: RequestError) -> RequestError:
        name = self.names[reason.field]
        if reason.field not in self.computed:
            return reason.of_parts(name, reason.given, reason.allowed, reason.hint)
        allowed, hint = f"what makes {reason.field} {reason.allowed}", f"It makes {reason.field}={reason.given}."
        return type(reason)(name, self.computed[reason.field], allowed, f"{hint} {reason.hint}")


@dataclass(frozen=True)
class ParsedBody(Generic[B]):
    """A body that was read and checked.

    Attributes:
        fields: of it.
        requests: that it asks for.
        options: that it has for them.
        origins: of the requests' fields.
    """

    fields: B
    requests: tuple[GenerationRequest, ...]
    options: SubmitOptions
    origins: Origins


@dataclass(frozen=True)
class NamedFields(Generic[B]):
    """Fields of a body under their own names, not checked yet.

    Attributes:
        model: of the body.
        values: by own name; those in ``extra_params`` are among them, those that are null are not.
        warnings: one for each field that was accepted without effect.
        written: own name -> name in the body, where that is another.
    """

    model: type[B]
    values: dict[str, Any]
    warnings: tuple[str, ...]
    written: dict[str, str]

    def parse(self, rules: BodyRules) -> ParsedBody[B]:
        """Check the values.

        Args:
            rules: for them.

        Raises:
            RequestError: a field does not take its value, or not beside another one.
        """
        with Origins(self.written).restored():
            fields = parse(self.model, self.values)
            given = fields.given()
            media = {kind: name for kind, (name, _) in find_media(given).items()}
            computed = {name: of for name, of in _COMPUTED_FROM.items() if of in given and name not in given}
            equal = {name: of for name, of in _EQUAL_TO.items() if of in given}
            names = self.written | {name: self.written.get(of, of) for name, of in (media | computed | equal).items()}
            options = _options(fields, rules, self.warnings)
        origins = Origins(names, {name: self.values[of] for name, of in computed.items()})
        with origins.restored():
            return ParsedBody(fields, fields.requests(), options, origins)


def name_fields(fields: Mapping[str, Any], model: type[B]) -> NamedFields[B]:
    """Find the field that each name in a body means.

    Args:
        fields: of a JSON body as they are; of a form :class:`FormText`, and the bytes of files.
        model: of the body.

    Raises:
        RequestError: a field is unknown (names the nearest one), given twice, or one too many.
        CapabilityError: a field asks for what is not offered.
    """
    naming = _Naming(model)
    naming.add(fields, "")
    if (extra := naming.values.pop("extra_params", None)) is not None:
        extra = model.type_of("extra_params").value_of("extra_params", extra)
        if "extra_params" in extra:
            raise RequestError("extra_params", start_of(extra), "a JSON object without extra_params in it")
        if len(extra) > MAX_FIELDS:
            raise RequestError("extra_params", f"an object of {len(extra)} fields", f"at most {MAX_FIELDS} of them")
        naming.add(extra, "extra_params.")
    written = {name: written for name, written in naming.names.items() if written != name}
    return NamedFields(model, naming.values, tuple(naming.warnings), written)


def parse(model: type[M], values: Mapping[str, Any]) -> M:
    """Check the values of a model's fields.

    Raises:
        RequestError: a field does not take its value; the first such one.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise request_error(error.errors(include_url=False)[0], model.model_fields) from None


def request_error(fault: Mapping[str, Any], names: Iterable[str]) -> RequestError:
    """Return a fault that pydantic has found as an error of ours.

    Args:
        fault: one of its errors.
        names: of the fields that there are.
    """
    name = str(fault["loc"][-1])
    reason = fault.get("ctx", {}).get("error")
    if isinstance(reason, RequestError):
        return reason.of_parts(name, reason.given, reason.allowed, reason.hint)
    if fault["type"] == "extra_forbidden":
        return unknown_name(name, fault["input"], names)
    if fault["type"] == "missing":
        return RequestError(name, None, "given")
    return RequestError(name, start_of(fault["input"]), fault["msg"].removeprefix("Input should be "))


def start_of(value: Any) -> Any:
    """Return a value for a message: of a long text or file its beginning."""
    return value[:_MAX_SHOWN_CHARS] if isinstance(value, str | bytes) else value


@dataclass
class _Naming:
    """State of :func:`name_fields`.

    Attributes:
        model, values, warnings: as in :class:`NamedFields`.
        names: own name -> name in the body; where it has several, the own one.
    """

    model: type[RequestBody]
    values: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def add(self, fields: Mapping[str, Any], prefix: str) -> None:
        """Add fields; the prefix stands before their names in warnings."""
        for written, value in fields.items():
            name = self.model.aliases().get(written, written)
            if name in self.model.model_fields:
                if value is not None:
                    self._add_value(written, name, value)
            elif reason := find_reason(self.model.not_offered, written):
                if value is not None:
                    raise CapabilityError(written, start_of(value), "left out", f"Not offered: {reason}.")
            elif reason := find_reason(self.model.no_effect, written):
                if value is not None:
                    _check_small(written, value)
                    self.warnings.append(f"{prefix}{written} is without effect: {reason}")
            elif self.model is ImageBody and written in ("width", "height"):
                raise RequestError(written, start_of(value), "left out: unknown field", "Give size, WIDTHxHEIGHT.")
            else:
                raise unknown_name(written, value, self.model.model_fields, also=self.model.aliases())

    def _add_value(self, written: str, name: str, value: Any) -> None:
        value = self.model.type_of(name).read_value(written, value)
        if name in self.values and self.values[name] != value:
            raise RequestError(written, start_of(value), f"equal to {name}, which is given as well")
        self.values[name] = value
        self.names[name] = written if self.names.get(name, written) == written else name


def unknown_name(
    name: str, value: Any, names: Iterable[str], what: str = "field", also: Iterable[str] = ()
) -> RequestError:
    """Return the error of a field or parameter that there is not.

    Args:
        name, value: of it.
        names: of those that there are.
        what: it is.
        also: other names that it may have been meant for.
    """
    near = difflib.get_close_matches(name[:_MAX_SHOWN_CHARS], [*names, *also], n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    hint += f"{what.capitalize()}s are {', '.join(names)}." if names else f"There are no {what}s here."
    return RequestError(name, start_of(value), f"left out: unknown {what}", hint)


def _options(fields: RequestBody, rules: BodyRules, warnings: tuple[str, ...]) -> SubmitOptions:
    if fields.model not in (None, rules.model_name):
        raise RequestError("model", start_of(fields.model), f"{rules.model_name!r}, the one that is served")
    if fields.guardrails and not rules.has_guardrails:
        hint = "Nothing is looked at here: the operator has not configured any."
        raise CapabilityError("guardrails", True, "false or left out", hint)
    if fields.guardrails is False and not rules.may_disable_guardrails:
        hint = "The operator of this service does not let clients turn them off."
        raise RequestError("guardrails", False, "true or left out", hint)
    wanted = rules.default_class if fields.service_class is None else fields.service_class
    return SubmitOptions(
        service_class=checks.choice("service_class", wanted, rules.classes),
        previews=fields.previews if isinstance(fields, VideoBody) else 0,
        skip_guardrails=fields.guardrails is False,
        warnings=warnings,
    )


def _check_small(name: str, value: Any) -> None:
    """Check that a value without effect is not large either.

    Raises:
        RequestError: it is.
    """
    if isinstance(value, bytes):
        raise RequestError(name, "a file", "a text", "It has no effect anyway.")
    left, waiting = LIMITS.max_prompt_chars, [value]
    while waiting:
        it = waiting.pop()
        left -= _CHARS_PER_VALUE + (len(it) if isinstance(it, str | list | dict) else 0)
        if left < 0:
            given = start_of(value) if isinstance(value, str) else f"a large {type(value).__name__}"
            raise RequestError(name, given, f"at most {LIMITS.max_prompt_chars} characters", "It has no effect anyway.")
        if isinstance(it, dict):
            waiting += [*it, *it.values()]
        elif isinstance(it, list):
            waiting += it
