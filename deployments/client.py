"""The graph from Python: any process of the Ray cluster can call a running app.

client = connect()
generated = client.generate(GenerationRequest(prompt="..."))
for event in client.stream(GenerationRequest(prompt="...")): ...
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from ray.exceptions import RayError

from cluster.errors import AppNotFound, DeadlineExceeded
from cosmos3_core import checks
from cosmos3_core.preview import MAX_PREVIEWS
from cosmos3_core.request import GenerationRequest
from deployments.errors import typed
from deployments.messages import Event, Generated
from deployments.streams import BlockingStream

DEFAULT_TIMEOUT_S = 3600.0
# The Director keeps the deadline and says so; this is for one that is gone.
_SLACK_S = 30.0
_LONGEST_S = 1e6
_PART_BYTES = 1 << 20


class Client:
    """A running app's Director.

    Args:
        handle: of the Director deployment.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    def generate(self, request: GenerationRequest, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Generated:
        """Serve a request and wait for its file, for ``timeout_s`` or the app's own limit, whichever is shorter.

        Images and clips given as paths are read here, in the caller's process.

        Raises:
            RequestError: the request is wrong, or its image or clip cannot be read.
            OverloadedError: no place is free; says when to try again.
            DeadlineExceeded, StageFailed: it could not be done.
        """
        timeout_s = checks.real("timeout_s", timeout_s, 0, _LONGEST_S)
        response = self._handle.generate.remote(request.packed(), None, timeout_s)
        try:
            return response.result(timeout_s=timeout_s + _SLACK_S)
        except TimeoutError:
            raise DeadlineExceeded("director", timeout_s) from None
        except Exception as error:  # noqa: BLE001 - told apart by what it wraps
            raise typed(error, "director") from None
        finally:
            response.cancel()

    def read(self, media_id: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Iterator[bytes]:
        """A finished file in parts: that of :attr:`Finished.media_id`, as long as the app keeps it.

        Raises, while iterating:
            RequestError: there is no such file, or not any more.
            DeadlineExceeded: the file did not come in time.
        """
        deadline_s = time.monotonic() + checks.real("timeout_s", timeout_s, 0, _LONGEST_S)
        start = 0
        while True:
            response = self._handle.read.remote(media_id, start, _PART_BYTES)
            try:
                part: bytes = response.result(timeout_s=max(0.0, deadline_s - time.monotonic()))
            except TimeoutError:
                raise DeadlineExceeded("director", timeout_s) from None
            except Exception as error:  # noqa: BLE001 - told apart by what it wraps
                raise typed(error, "director") from None
            if not part:
                return
            yield part
            start += len(part)

    def stream(
        self, request: GenerationRequest, *, timeout_s: float = DEFAULT_TIMEOUT_S, previews: int = 0
    ) -> EventStream:
        """Serve a request and follow it: events, :class:`Finished` the last; :meth:`read` has the file.

        With ``previews`` up to so many of the events (32 at most) are a :class:`deployments.messages.PreviewReady`, a
        small WebP of what is being made; a :class:`deployments.messages.PreviewsOff` says why there are none.

        Raises, while iterating: as :meth:`generate`; at once: an image or clip cannot be read, a number is out of
        range.
        """
        timeout_s = checks.real("timeout_s", timeout_s, 0, _LONGEST_S)
        previews = checks.integer("previews", previews, 0, MAX_PREVIEWS)
        return EventStream(self._streaming.stream.remote(request.packed(), None, timeout_s, previews), timeout_s)


class EventStream:
    """An iterator of events. Closing it, leaving its ``with`` block, or dropping it stops the work of every stage."""

    def __init__(self, response: Any, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._items = BlockingStream(response, timeout_s + _SLACK_S)
        self._has_ended = False

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        try:
            event: Event = next(self._items)
            return event
        except StopIteration:
            self._has_ended = True
            raise
        except TimeoutError:
            raise DeadlineExceeded("director", self._timeout_s) from None
        except Exception as error:  # noqa: BLE001 - told apart by what it wraps
            raise typed(error, "director") from None

    def close(self) -> None:
        """Stop. Does nothing once the stream has ended."""
        if not self._has_ended:
            self._has_ended = True
            self._items.cancel()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Serve lets a stream run on when its response is dropped. Ray may be gone by now, and the stream with it.
        with contextlib.suppress(RayError):
            self.close()


def connect(app_name: str = "cosmos3") -> Client:
    """The running app of that name.

    It is looked for in the Ray cluster that this process is connected to; if it is to none, in the one that
    ``RAY_ADDRESS`` names or that runs on this machine. Where several run on it, name one: ``cosmos3 serve`` prints
    the environment that leads to its own.

    Raises:
        AppNotFound: there is no such cluster, it refuses this process, or no such app runs in it.
    """
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        if not ray.is_initialized():
            ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        return Client(serve.get_deployment_handle("Director", app_name=app_name))
    except ConnectionError as error:
        raise AppNotFound(f"no Ray cluster could be joined; set RAY_ADDRESS: {error}") from None
    except (KeyError, RayServeException) as error:
        address = ray.get_runtime_context().gcs_address
        hint = "set RAY_ADDRESS, and what else `cosmos3 serve` printed, to reach another one"
        raise AppNotFound(f"no app {app_name!r} runs in the Ray cluster at {address}; {hint}: {error}") from None
