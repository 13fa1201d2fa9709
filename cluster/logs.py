"""Log lines about requests, of one shape everywhere: what happened, to which request, how long it took.

To find a request's lines by its id, on every node of the cluster in ``/tmp/ray/session_latest/logs``:

    grep -rh '"request_id": "ID"' serve/ worker-*.err

``serve/`` has the replicas': Director, tokenizer, leaders, encoder, one file each. A rank is a process of its own: Ray
puts its standard error into ``worker-<worker id>-<Ray's job>-<pid>.err``; :func:`log_to_stderr` makes JSON of it.

Callers choose request ids, and error messages may quote callers: :func:`one_line` escapes everything that could begin a
line or control a terminal. Neither prompts nor other values of a request are logged.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cosmos3_core.errors import Cosmos3Error, RequestError

_MAX_CHARS = 300
Value = str | int | float | None


@dataclass(frozen=True)
class LogOrigin:
    """Names the request that a piece of work belongs to.

    Attributes:
        request_id: the caller's name for the request.
        job_id: our id for it.
        attempt: of the stage, from 1.
    """

    request_id: str
    job_id: str
    attempt: int = 1


def one_line(text: object, max_chars: int = _MAX_CHARS) -> str:
    """Return text fit for a log line: shortened, with control characters and line ends of any kind escaped."""
    line = str(text)[: max_chars + 1]
    if not line.isprintable():
        line = "".join(it if it.isprintable() else it.encode("unicode_escape").decode() for it in line)
    return line if len(line) <= max_chars else f"{line[: max_chars - 3]}..."


def log_event(
    logger: logging.Logger, event: str, origin: LogOrigin | None = None, level: int = logging.INFO, /, **fields: Value
) -> None:
    """Log an event. The fields are attributes of the record, for JSON, and in the message, for a reader.

    The message leaves out the request id: Serve's text has it at the beginning of a line.

    Args:
        event: two or three words, always the same.
        fields: name -> value; names must not be attributes of :class:`logging.LogRecord`.
    """
    if not logger.isEnabledFor(level):
        return
    whose: dict[str, Value] = {} if origin is None else vars(origin)
    shown = {name: _show(value) for name, value in (whose | fields).items() if value is not None}
    message = " ".join([event, *(f"{name}={value}" for name, value in shown.items() if name != "request_id")])
    path, line, function, _ = logger.findCaller(stacklevel=2)
    record = logging.LogRecord(logger.name, level, path, line, message, None, None, function)
    record.__dict__.update(shown, event=event)
    record.__class__ = _Event  # only now: to set each attribute by it is slow
    logger.handle(record)


def log_failure(
    logger: logging.Logger, event: str, origin: LogOrigin | None, error: BaseException, **fields: Value
) -> None:
    """Log an error, as a warning."""
    log_event(logger, event, origin, logging.WARNING, error=type(error).__name__, reason=_reason(error), **fields)


def _reason(error: BaseException) -> str:
    """Describe an error of ours or the system; of others, which may quote a prompt, give only the place."""
    if isinstance(error, RequestError):
        return f"{error.field} must be {error.allowed}"
    if isinstance(error, Cosmos3Error | OSError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    return f"raised in {os.path.basename(frames[-1].filename)}, line {frames[-1].lineno}" if frames else ""


def _show(value: Value) -> str | int | float:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else str(value)  # JSON has no infinity
    return value if isinstance(value, int) else one_line(value)


class _Event(logging.LogRecord):
    """A record that keeps its request's ids.

    Serve's handlers set their own request id on every record, and delete ``job_id``, which is Ray's to them.
    """

    _KEPT = frozenset({"request_id", "job_id"})

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self._KEPT or name not in self.__dict__:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name not in self._KEPT:
            super().__delattr__(name)


_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", None, None))) | {"message", "asctime", "taskName"}


class JsonLines(logging.Formatter):
    """Formats records as lines of JSON with the names of Serve's logs, and ``fields`` in every line."""

    def __init__(self, **fields: Value) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line of JSON."""
        line: dict[str, object] = {
            "asctime": self.formatTime(record),
            "levelname": record.levelname,
            "message": record.getMessage(),
            "filename": record.filename if hasattr(record, "filename") else record.module,
            "lineno": record.lineno,
            "process": os.getpid(),
        }
        line |= self._fields
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            line["exc_text"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Handler of :func:`log_to_stderr`, which replaces an earlier one of this type."""


def log_to_stderr(**fields: Value) -> None:
    """Write everything that this process logs to its standard error, as :class:`JsonLines` with ``fields``."""
    root = logging.getLogger()
    for handler in [it for it in root.handlers if isinstance(it, _Handler)]:
        root.removeHandler(handler)
    handler = _Handler()
    handler.setFormatter(JsonLines(**fields))
    root.addHandler(handler)
    for package in ("cluster", "cosmos3_core"):
        logging.getLogger(package).setLevel(logging.INFO)


@dataclass
class _Work:
    origin: LogOrigin
    seconds: float = 0.0
    num_calls: int = 0


@dataclass
class RankLog:
    """Logs begin, failures and end of a rank's pieces of work, except those without an origin: the warm-up."""

    logger: logging.Logger
    _works: dict[str, _Work] = field(default_factory=dict)

    @contextmanager
    def begin(self, work_id: str, origin: LogOrigin | None) -> Iterator[None]:
        """Log the begin of a piece of work; later calls refer to it by its id."""
        with self.run("begin", origin):
            yield
        if origin is not None:
            self._works[work_id] = _Work(origin)

    @contextmanager
    def run(self, phase: str, origin: LogOrigin | None) -> Iterator[None]:
        """Log a piece of work that is done in one call."""
        if origin is None:
            yield
            return
        start_s = time.monotonic()
        try:
            yield
        except Exception as error:
            log_failure(self.logger, f"{phase} failed", origin, error, phase=phase, seconds=time.monotonic() - start_s)
            raise
        log_event(self.logger, f"{phase} done", origin, phase=phase, seconds=time.monotonic() - start_s)

    @contextmanager
    def resume(self, work_id: str, phase: str) -> Iterator[None]:
        """Log only the failure of a call, one of many in a piece of work."""
        work = self._works.get(work_id)
        if work is None:
            yield
            return
        start_s = time.monotonic()
        try:
            yield
        except Exception as error:
            log_failure(self.logger, f"{phase} failed", work.origin, error, phase=phase)
            raise
        finally:
            work.seconds += time.monotonic() - start_s
            work.num_calls += 1

    def end(self, work_id: str) -> None:
        """Log the end of a piece of work, if it is there."""
        work = self._works.pop(work_id, None)
        if work is not None:
            log_event(
                self.logger, "work ended", work.origin, phase="end", seconds=work.seconds, num_calls=work.num_calls
            )
