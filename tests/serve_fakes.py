"""Serve's handles without Ray: what a call returns, and what cancelling it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any


class Ref:
    """An object reference: awaiting it gives the value or raises."""

    def __init__(self, value: Any, error: Exception | None = None) -> None:
        self.value, self.error = value, error

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        if self.error is not None:
            raise self.error
        return self.value


class Response:
    """The response of a call: awaited a value, iterated a stream of items or of references to them.

    Args:
        source: the method's coroutine or asynchronous generator.
        on_cancel: called when the caller cancels.
    """

    def __init__(self, source: Any, on_cancel: Callable[[], None] | None = None) -> None:
        self._source, self._on_cancel = source, on_cancel
        self.is_cancelled = False

    def __await__(self) -> Any:
        return self._source.__await__()

    def __aiter__(self) -> Response:
        return self

    async def __anext__(self) -> Any:
        return await anext(self._source)

    async def _to_object_ref_gen(self) -> AsyncIterator[Ref]:
        async def iterate_refs() -> AsyncIterator[Ref]:
            # As with Ray, the producer's error or death is the last item.
            try:
                async for item in self._source:
                    yield Ref(item)
            except Exception as error:  # noqa: BLE001 - as Ray's
                yield Ref(None, error)

        return iterate_refs()

    def cancel(self) -> None:
        self.is_cancelled = True
        if self._on_cancel is not None:
            self._on_cancel()


class Method:
    """``handle.method`` for a coroutine or an asynchronous generator function; records the responses."""

    def __init__(self, body: Callable[..., Any]) -> None:
        self._body = body
        self.responses: list[Response] = []

    def remote(self, *arguments: Any) -> Response:
        self.responses.append(Response(self._body(*arguments)))
        return self.responses[-1]


class Handle:
    """A handle whose calls run an object's methods."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def options(self, *, stream: bool) -> Handle:
        return self

    def __getattr__(self, name: str) -> Method:
        return Method(getattr(self._target, name))
