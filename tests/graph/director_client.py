"""A Director by its bare handle: every message between the stages, with the processes that they are about.

The clients of :mod:`deployments.client` tell less, and the same over HTTP; what tests ask of the inside is told here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError

from cluster.errors import DeadlineExceeded
from cosmos3_core.request import GenerationRequest
from deployments.failures import translate_error
from deployments.jobs.submit_options import SubmitOptions
from deployments.messages import Event, Generated

DEFAULT_TIMEOUT_S = 3600.0
# The Director keeps the deadline and says so; this is for one that is gone.
_SLACK_S = 30.0
_PART_BYTES = 1 << 20


class DirectorClient:
    """See the module.

    Args:
        handle: of the Director deployment.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    def generate(self, request: GenerationRequest, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Generated:
        """Serve a request and wait for its file."""
        generated: Generated = self.ask(
            self._handle.generate, request.packed(), SubmitOptions(), timeout_s, limit_s=timeout_s
        )
        return generated

    def stream(
        self, request: GenerationRequest, *, timeout_s: float = DEFAULT_TIMEOUT_S, previews: int = 0
    ) -> EventStream:
        """Serve a request and follow it."""
        options = SubmitOptions(previews=previews)
        return EventStream(self._streaming.stream.remote(request.packed(), options, timeout_s), timeout_s)

    def read(self, job_id: str) -> Iterator[bytes]:
        """A finished file in parts."""
        start = 0
        while part := self.ask(self._handle.read, job_id, start, _PART_BYTES):
            yield part
            start += len(part)

    def ask(self, method: Any, *arguments: Any, limit_s: float = DEFAULT_TIMEOUT_S) -> Any:
        """What a method of the Director answers."""
        response = method.remote(*arguments)
        try:
            return response.result(timeout_s=limit_s + _SLACK_S)
        except TimeoutError:
            raise DeadlineExceeded("director", limit_s) from None
        except Exception as error:  # noqa: BLE001 - told apart by what it wraps
            raise translate_error(error, "director") from None
        finally:
            response.cancel()


class EventStream:
    """An iterator of messages. Closing it, leaving its ``with`` block, or dropping it stops the work of every stage."""

    def __init__(self, response: Any, timeout_s: float) -> None:
        self._response, self._timeout_s = response, timeout_s
        self._deadline_s = time.monotonic() + timeout_s + _SLACK_S
        self._refs: Any = None
        self._has_ended = False

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        try:
            if self._refs is None:
                self._refs = self._response._to_object_ref_gen_sync(_timeout_s=self._left_s())
            ref = self._refs._next_sync(timeout_s=self._left_s())
            if ref.is_nil():
                raise TimeoutError
            event: Event = ray.get(ref, timeout=self._left_s())
            return event
        except StopIteration:
            self._has_ended = True
            raise
        except TimeoutError:
            raise DeadlineExceeded("director", self._timeout_s) from None
        except Exception as error:  # noqa: BLE001 - told apart by what it wraps
            raise translate_error(error, "director") from None

    def close(self) -> None:
        """Stop. Does nothing once the stream has ended."""
        if not self._has_ended:
            self._has_ended = True
            self._response.cancel()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Serve lets a stream run on when its response is dropped. Ray may be gone by now, and the stream with it.
        with contextlib.suppress(RayError):
            self.close()

    def _left_s(self) -> float:
        return max(0.0, self._deadline_s - time.monotonic())


def connect(app_name: str) -> DirectorClient:
    """The Director of the running app of that name, in the cluster that this process has joined."""
    return DirectorClient(serve.get_deployment_handle("Director", app_name=app_name))
