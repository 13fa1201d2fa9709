"""Following a video over connections that break: every event once, in order, to the last one."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from cluster.errors import DeadlineExceeded, StageFailed
from cosmos3_core.errors import Cosmos3Error
from deployments.clients.answers import read_answer
from deployments.clients.deadline import Deadline
from deployments.clients.errors import COMEBACK, NotFound, UnreachableError
from deployments.clients.transport import Transport
from deployments.jobs.events import DELETED, VideoEnded, VideoEvent
from deployments.jobs.video import Video

# What may be over in a moment: a broken connection, an app that is restarted, a Director that died.
_PASSING = (UnreachableError, StageFailed, *COMEBACK)
# A connection that was good for so long was no failure: there are proxies that end every one after a minute.
_HELD_S = 10.0


@dataclass(frozen=True)
class Patience:
    """What is tried again, and for how long.

    Attributes:
        max_wait_s: how long a call that is refused for now (429, 503) is put off in all; 0: not at all.
        max_reconnects: connections one after the other that tell nothing new before a follower gives up.
        first_pause_s, max_pause_s: before the first of them; it doubles up to the longest.
    """

    max_wait_s: float = 0.0
    max_reconnects: int = 8
    first_pause_s: float = 0.25
    max_pause_s: float = 10.0

    def pause_s(self, tries: int, asked_s: float = 0.0) -> float:
        """Before try number ``tries``, from 1; no shorter than the app asks for.

        Not all who lost the same server, or were told the same, come back at the same moment.
        """
        longest = min(self.max_pause_s, self.first_pause_s * 2.0 ** (tries - 1))
        return max(longest * random.uniform(0.75, 1.0), asked_s * random.uniform(1.0, 1.1))


DEFAULT_PATIENCE = Patience()


async def following(
    transport: Transport, video_id: str, after: int, deadline: Deadline, patience: Patience
) -> AsyncGenerator[VideoEvent, None]:
    """The events of a video behind number ``after``; :class:`VideoEnded` is the last, where it is behind that.

    Raises:
        NotFound: there is no such video, or not any more.
        DeadlineExceeded: the time is up.
        UnreachableError: the app is away for longer than ``patience`` has.
    """
    tries, was_final = 0, False
    while True:
        began_s, is_told = time.monotonic(), False
        try:
            async with aclosing(transport.events(video_id, after, deadline.left_s)) as events:
                while (event := await _next(events, deadline)) is not None:
                    tries, is_told = 0, True
                    if event.kind == DELETED:
                        raise NotFound.video(video_id)
                    if event.seq is not None:
                        if event.seq <= after:
                            continue
                        after = event.seq
                    yield event
                    if isinstance(event, VideoEnded):
                        return
            # It may have been deleted, or its last event was told before.
            is_final = read_answer(Video, await transport.job(video_id)).has_ended
            if was_final and not is_told:
                return
            was_final = is_final
            trouble: Cosmos3Error = UnreachableError(f"the events of {video_id} ended before their last one")
            asked_s = 0.0
        except _PASSING as error:
            trouble = error
            asked_s = error.retry_after_s if isinstance(error, COMEBACK) else 0.0
        tries = 1 if time.monotonic() - began_s > _HELD_S else tries + 1
        if tries > patience.max_reconnects:
            raise trouble
        try:
            await deadline.wait(asyncio.sleep(patience.pause_s(tries, asked_s)))
        except TimeoutError:
            raise _too_late(deadline) from None


async def _next(events: AsyncGenerator[VideoEvent, None], deadline: Deadline) -> VideoEvent | None:
    try:
        return await deadline.wait(anext(events, None))
    except TimeoutError:
        raise _too_late(deadline) from None


def _too_late(deadline: Deadline) -> DeadlineExceeded:
    return DeadlineExceeded("follow", deadline.limit_s)
