"""Previews: they come while steps are made, change with them, and leave the clip as it is."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import PIL.Image
import pytest

from cluster.events import PreviewReady, PreviewsOff, StepDone
from cosmos3_core.errors import RequestError
from cosmos3_core.request import GenerationRequest
from deployments import messages

pytestmark = pytest.mark.timeout(600)

SMALL = GenerationRequest(prompt="A red car.", num_frames=17, height=80, width=96, num_inference_steps=6, seed=5)


def webp_of(event: PreviewReady) -> PIL.Image.Image:
    assert event.media_type == "image/webp"
    assert len(event.image) < 50_000
    return PIL.Image.open(io.BytesIO(event.image), formats=["WEBP"])


def test_previews_come_while_steps_are_made_and_change_with_them(app: Any) -> None:
    """Steps of a tenth of a second or more, so that a quantum is one or two; the clip itself is not waited for."""
    request = replace(SMALL, num_frames=121, height=192, width=320, num_inference_steps=12)
    events: list[StepDone | PreviewReady] = []
    with app.client.stream(request, previews=6) as stream:
        for event in stream:
            assert not isinstance(event, PreviewsOff), event.reason
            if isinstance(event, StepDone | PreviewReady):
                events.append(event)
            if isinstance(event, messages.LatentsReady):
                break
    previews = [event for event in events if isinstance(event, PreviewReady)]
    assert 2 <= len(previews) <= 6
    sigmas = {event.step: event.sigma for event in events if isinstance(event, StepDone)}
    assert list(sigmas) == list(range(1, 13))
    for preview in previews:
        before = [event.step for event in events[: events.index(preview)] if isinstance(event, StepDone)]
        assert preview.step in before
        assert preview.sigma == sigmas[preview.step]
        with webp_of(preview) as image:
            assert (image.size, image.n_frames) == ((256, 154), 12)
    assert isinstance(events[-1], StepDone), "a preview after the last step"
    assert [preview.step for preview in previews] == sorted({preview.step for preview in previews})
    assert len({preview.image for preview in previews}) == len(previews), "a preview did not change"


def test_previews_leave_the_clip_as_it_is_and_are_stills_of_images(app: Any, reference: Callable[..., Any]) -> None:
    request = replace(SMALL, num_frames=1, num_inference_steps=200)  # several quanta
    events = list(app.client.stream(request, previews=5))
    (finished,) = (event for event in events if isinstance(event, messages.Finished))
    assert finished.frames_sha256 == reference(request).frames_sha256
    previews = [event for event in events if isinstance(event, PreviewReady)]
    assert 1 <= len(previews) <= 5
    for preview in previews:
        with webp_of(preview) as image:
            assert (image.size, image.n_frames) == ((256, 213), 1)


def test_a_director_refuses_more_previews_than_there_may_be(app: Any) -> None:
    with pytest.raises(RequestError, match="previews"):
        list(app.client.stream(SMALL, previews=33))
