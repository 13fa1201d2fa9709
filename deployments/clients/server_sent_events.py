"""Parse server-sent events as the HTML standard defines them, without ``retry``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from deployments.clients.errors import AnswerError

# Bound of one event's text: a finished video with its actions is far below.
_MAX_EVENT_BYTES = 1 << 24


class RawEvent(NamedTuple):
    """An event as it was sent; ``seq`` is its number in the video's history, None for events that are not stored."""

    seq: int | None
    kind: str
    data: Mapping[str, Any]


class EventReader:
    """Assembles events from parts of any size. One reader per connection."""

    def __init__(self) -> None:
        self._unread = bytearray()
        self._lines: list[bytes] = []
        self._num_bytes = 0
        self._is_first = True

    def feed(self, part: bytes) -> Iterator[RawEvent]:
        """Yield the events that this part completes.

        Raises:
            AnswerError: an event is no JSON object, or too long.
        """
        self._unread += part
        while (line := self._take_line()) is not None:
            if line:
                self._keep(line)
            elif (event := self._take_event()) is not None:
                yield event
        if self._num_bytes + len(self._unread) > _MAX_EVENT_BYTES:
            raise AnswerError(200, f"the app sends an event of more than {_MAX_EVENT_BYTES} bytes")

    def _take_line(self) -> bytes | None:
        """Take the next whole line, without its end: CR, LF or both."""
        ends = [at for at in (self._unread.find(b"\n"), self._unread.find(b"\r")) if at >= 0]
        if not ends:
            return None
        end = min(ends)
        after = end + 1
        if self._unread[end] == 0x0D:
            if after == len(self._unread):
                return None  # an LF may follow
            after += self._unread[after] == 0x0A
        line = bytes(self._unread[:end])
        del self._unread[:after]
        if self._is_first:
            self._is_first = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        return line

    def _keep(self, line: bytes) -> None:
        if not line.startswith(b":"):  # a comment, which keeps the connection alive
            self._lines.append(line)
            self._num_bytes += len(line)

    def _take_event(self) -> RawEvent | None:
        lines, self._lines, self._num_bytes = self._lines, [], 0
        kind, number, data = "message", "", []
        for line in lines:
            name, _, value = line.decode("utf-8", "replace").partition(":")
            value = value.removeprefix(" ")
            match name:
                case "event":
                    kind = value
                case "id":
                    number = value
                case "data":
                    data.append(value)
                case _:
                    pass
        if not data:
            return None
        try:
            values = json.loads("\n".join(data))
            if not isinstance(values, dict):
                raise TypeError
            return RawEvent(int(number) if number else None, kind, values)
        except (ValueError, TypeError):
            raise AnswerError(200, f"the app sends an event {kind!r} that is no JSON object") from None
