"""The `openai` package's own client, unchanged, against a running app."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import PIL.Image
import pytest

from cosmos3_core.media.image import write_image

openai = pytest.importorskip("openai")

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
]

SMALL: dict[str, Any] = {
    "prompt": "A red car.",
    "size": "64x32",
    "extra_body": {"num_frames": 9, "num_inference_steps": 2},
}


@pytest.fixture
def client(app: Any) -> Iterator[Any]:
    with openai.OpenAI(api_key="none is needed", base_url=f"{app.url}/v1", max_retries=0, timeout=120) as client:
        yield client


def test_create_poll_and_download(client: Any) -> None:
    video = client.videos.create_and_poll(**SMALL, poll_interval_ms=100)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.object, video.size, video.seconds, video.model) == ("video", "64x32", "0.375", "nano")
    assert video.completed_at >= video.created_at
    assert video.expires_at > video.completed_at
    with av.open(io.BytesIO(client.videos.download_content(video.id).read())) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9
    thumbnail = PIL.Image.open(io.BytesIO(client.videos.download_content(video.id, variant="thumbnail").read()))
    assert thumbnail.format == "WEBP"
    sheet = PIL.Image.open(io.BytesIO(client.videos.download_content(video.id, variant="spritesheet").read()))
    assert sheet.format == "JPEG"


def test_create_with_seconds_and_an_image_then_remix(client: Any) -> None:
    png = io.BytesIO()
    write_image(png, np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8), "png")
    first = client.videos.create(
        prompt="It drives away.",
        input_reference=("a.png", png.getvalue(), "image/png"),
        seconds="1",
        size="64x32",
        extra_body={"num_inference_steps": 2, "fps": 8, "seed": 5},
    )
    first = client.videos.poll(first.id, poll_interval_ms=100)
    assert (first.status, first.seconds) == ("completed", "1.125"), first.error
    remix = client.videos.remix(first.id, prompt="It comes back.")
    assert remix.remixed_from_video_id == first.id
    remix = client.videos.poll(remix.id, poll_interval_ms=100)
    assert (remix.status, remix.prompt, remix.seconds) == ("completed", "It comes back.", "1.125"), remix.error
    extra = remix.model_extra
    assert (extra["seed"], extra["mode"], extra["num_steps"]) == (5, "image_to_video", 2)
    assert extra["frames_sha256"] != first.model_extra["frames_sha256"]
    again = client.videos.poll(client.videos.remix(remix.id, prompt="It drives away.").id, poll_interval_ms=100)
    assert again.model_extra["frames_sha256"] == first.model_extra["frames_sha256"], "the same seed, fields and image"


def test_list_with_pagination_then_delete(client: Any) -> None:
    made = [client.videos.create(**SMALL).id for _ in range(5)]
    for video_id in made:
        client.videos.poll(video_id, poll_interval_ms=100)
    page = client.videos.list(limit=2)
    assert [video.id for video in page.data] == [made[4], made[3]]
    assert page.has_more
    assert [video.id for video in client.videos.list(limit=2, after=made[3]).data] == [made[2], made[1]]
    walked = [video.id for video in client.videos.list(limit=2)]
    assert walked[:5] == made[::-1], "the client's own pipeline over the pages"
    assert [video.id for video in client.videos.list(limit=100, order="asc").data][-5:] == made
    gone = client.videos.delete(made[0])
    assert (gone.id, gone.deleted, gone.object) == (made[0], True, "video.deleted")
    for call in (client.videos.retrieve, client.videos.delete, client.videos.download_content):
        with pytest.raises(openai.NotFoundError):
            call(made[0])
    assert made[0] not in [video.id for video in client.videos.list(limit=100).data]


def test_errors_are_typed_errors_of_the_client(client: Any) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="Did you mean num_frames"):
        client.videos.create(prompt="a", extra_body={"num_frame": 9})
    with pytest.raises(openai.UnprocessableEntityError, match="size"):
        client.videos.create(prompt="a", size="large")
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve("video_gen_00000000000000000000000000000000")


def test_images(client: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = client.images.generate(
            prompt="A red car.", n=2, size="64x32", response_format="b64_json", extra_body={"num_inference_steps": 2}
        )
    assert len(answer.data) == 2
    assert answer.data[0].b64_json != answer.data[1].b64_json
    assert [model.id for model in client.models.list().data] == ["nano"]
