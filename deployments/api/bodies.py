"""Turn the fields of a request body into generation requests and their :class:`SubmitOptions`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from cosmos3_core import checks
from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.presets import LIMITS
from cosmos3_core.request import GenerationRequest
from deployments.api.body_reader import MAX_FIELDS
from deployments.api.field_types import find_media
from deployments.api.fields import Body, ImageBody, RequestBody, VideoBody, find_reason
from deployments.config import DEFAULT_CLASS
from deployments.failures import unwrap_error
from deployments.jobs.job import SubmitOptions

# Of a name that is compared with known ones.
_MAX_COMPARED_CHARS = 200
# A value's own cost beside its characters.
_CHARS_PER_VALUE = 8
# Field of a request -> field of a body that it is computed from, or that it equals.
_COMPUTED_FROM = {"num_frames": "seconds", "width": "size", "height": "size", "lossless": "quality"}
_EQUAL_TO = {"output": "output_format", "output_quality": "output_compression"}

B = TypeVar("B", bound=Body)
R = TypeVar("R", bound=RequestBody)


@dataclass(frozen=True)
class BodyRules:
    """Values that the service and the caller allow in bodies. A body that names no class gets the default one."""

    model_names: tuple[str, ...]
    classes: tuple[str, ...]
    default_class: str = DEFAULT_CLASS
    has_guardrails: bool = False
    may_disable_guardrails: bool = False

    def options(self, fields: RequestBody, warnings: tuple[str, ...]) -> SubmitOptions:
        """Return the options of a body, or raise RequestError where the rules do not allow a value."""
        if fields.model is not None:
            checks.choice("model", fields.model, self.model_names)
        if fields.guardrails and not self.has_guardrails:
            hint = "Nothing is looked at here: the operator has not configured any."
            raise CapabilityError("guardrails", True, "false or left out", hint)
        if fields.guardrails is False and not self.may_disable_guardrails:
            hint = "The operator of this service does not let clients turn them off."
            raise RequestError("guardrails", False, "true or left out", hint)
        service_class = self.default_class if fields.service_class is None else fields.service_class
        return SubmitOptions(
            service_class=checks.choice("service_class", service_class, self.classes),
            previews=fields.previews if isinstance(fields, VideoBody) else 0,
            skip_guardrails=fields.guardrails is False,
            warnings=warnings,
        )


@dataclass(frozen=True)
class Origins:
    """Names of a request's fields in its body.

    Attributes:
        names: field of the request -> field of the body.
        computed: field of the request -> value in the body that it is computed from.
    """

    names: dict[str, str]
    computed: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def restore_names(self) -> Iterator[None]:
        """Rename fields in errors raised inside, here or in another process, to the names in the body."""
        try:
            yield
        except Exception as error:  # the wrapped error decides
            reason = unwrap_error(error)
            if not isinstance(reason, RequestError) or reason.field not in self.names:
                raise
            raise self._rename(reason) from None

    def _rename(self, reason: RequestError) -> RequestError:
        name = self.names[reason.field]
        if reason.field not in self.computed:
            return reason.of_parts(name, reason.given, reason.allowed, reason.hint)
        allowed, hint = f"what makes {reason.field} {reason.allowed}", f"It makes {reason.field}={reason.given}."
        return type(reason)(name, self.computed[reason.field], allowed, f"{hint} {reason.hint}")


@dataclass(frozen=True)
class ParsedBody(Generic[R]):
    """A body that was read and checked: its fields, and what it asks for."""

    fields: R
    requests: tuple[GenerationRequest, ...]
    options: SubmitOptions
    origins: Origins


@dataclass
class NamedFields(Generic[B]):
    """Fields of a body under their own names, not checked yet.

    Attributes:
        values: own name -> value, those in ``extra_params`` included, those that are null left out.
        names_in_body: own name -> name in the body; where it has several, the own one.
        warnings: one for each field that was accepted without effect.
    """

    model: type[B]
    values: dict[str, Any] = field(default_factory=dict)
    names_in_body: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, fields: Mapping[str, Any], model: type[B]) -> NamedFields[B]:
        """Resolve the names in a body; raise RequestError for one that is unknown, given twice or not offered."""
        named = cls(model)
        named._add(fields, "")
        if (extra := named.values.pop("extra_params", None)) is not None:
            extra = model.type_of("extra_params").check("extra_params", extra)
            if "extra_params" in extra:
                raise RequestError("extra_params", extra, "a JSON object without extra_params in it")
            if len(extra) > MAX_FIELDS:
                raise RequestError("extra_params", f"an object of {len(extra)} fields", f"at most {MAX_FIELDS} of them")
            named._add(extra, "extra_params.")
        return named

    def _add(self, fields: Mapping[str, Any], prefix: str) -> None:
        """Add fields; the prefix stands before their names in warnings."""
        for written, value in fields.items():
            name = self.model.aliases().get(written, written)
            is_known = name in self.model.model_fields
            not_offered = None if is_known else find_reason(self.model.not_offered, written)
            no_effect = None if is_known or not_offered else find_reason(self.model.no_effect, written)
            if not (is_known or not_offered or no_effect):
                if self.model is ImageBody and written in ("width", "height"):
                    raise RequestError(written, value, "left out: unknown field", "Give size, WIDTHxHEIGHT.")
                raise make_unknown_name_error(written, value, self.model.model_fields, also=self.model.aliases())
            if value is None:
                continue
            if not_offered:
                raise CapabilityError(written, value, "left out", f"Not offered: {not_offered}.")
            if no_effect:
                _check_small(written, value)
                self.warnings.append(f"{prefix}{written} is without effect: {no_effect}")
                continue
            value = self.model.type_of(name).normalize(written, value)
            if name in self.values and self.values[name] != value:
                raise RequestError(written, value, f"equal to {name}, which is given as well")
            self.values[name] = value
            self.names_in_body[name] = written if self.names_in_body.get(name, written) == written else name

    def check(self) -> B:
        """Check each value by itself; raise RequestError for the first wrong one, under its name in the body."""
        with Origins(self.names_in_body).restore_names():
            try:
                return self.model.model_validate(self.values)
            except ValidationError as error:
                raise translate_fault(error.errors(include_url=False)[0]) from None


def parse_body(named: NamedFields[R], rules: BodyRules) -> ParsedBody[R]:
    """Check the values of a body and make its requests; raise RequestError for a wrong or conflicting value."""
    fields = named.check()
    with Origins(named.names_in_body).restore_names():
        given = fields.given_fields
        media = find_media(given)
        computed = {name: of for name, of in _COMPUTED_FROM.items() if of in given and name not in given}
        equal = {name: of for name, of in _EQUAL_TO.items() if of in given}
        options = rules.options(fields, tuple(named.warnings))
    files = {kind: data for kind, (_, data) in media.items()}
    sources = {kind: name for kind, (name, _) in media.items()} | computed | equal
    names = named.names_in_body | {name: named.names_in_body[of] for name, of in sources.items()}
    origins = Origins(names, {name: named.values[of] for name, of in computed.items()})
    with origins.restore_names():
        return ParsedBody(fields, fields.requests(files), options, origins)


def translate_fault(fault: Mapping[str, Any]) -> RequestError:
    """Translate one of pydantic's errors."""
    name = str(fault["loc"][-1])
    reason = fault.get("ctx", {}).get("error")
    if isinstance(reason, RequestError):
        return reason.of_parts(name, reason.given, reason.allowed, reason.hint)
    if fault["type"] == "missing":
        return RequestError(name, None, "given")
    return RequestError(name, fault["input"], fault["msg"].removeprefix("Input should be "))


def make_unknown_name_error(
    name: str, value: Any, names: Iterable[str], what: str = "field", also: Iterable[str] = ()
) -> RequestError:
    """Return the error for an unknown name, with the known ones and the nearest of these and of ``also``."""
    near = difflib.get_close_matches(name[:_MAX_COMPARED_CHARS], [*names, *also], n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    hint += f"{what.capitalize()}s are {', '.join(names)}." if names else f"There are no {what}s here."
    return RequestError(name, value, f"left out: unknown {what}", hint)


def _check_small(name: str, value: Any) -> None:
    """Refuse a large value even in a field without effect."""
    if isinstance(value, bytes):
        raise RequestError(name, "a file", "a text", "It has no effect anyway.")
    num_left, to_count = LIMITS.max_prompt_chars, [value]
    while to_count:
        it = to_count.pop()
        num_left -= _CHARS_PER_VALUE + (len(it) if isinstance(it, str | list | dict) else 0)
        if num_left < 0:
            given = value if isinstance(value, str) else f"a large {type(value).__name__}"
            raise RequestError(name, given, f"at most {LIMITS.max_prompt_chars} characters", "It has no effect anyway.")
        to_count += [*it, *it.values()] if isinstance(it, dict) else it if isinstance(it, list) else []
