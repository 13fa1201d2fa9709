"""What the model reads with actions: the structured caption, to the letter of diffusers 0.42.1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cosmos3_core.errors import RequestError
from cosmos3_core.phyai import Cosmos3Processor
from cosmos3_core.prompts import load_tokenizer, tokenize_prompts
from cosmos3_core.request import VIEW_POINTS, GenerationRequest
from cosmos3_core.resolve import resolve
from tests.mode_inputs import MINIMAL

PROMPTS = ["Put the cup down", "Put it down.", " Is it down? ", "Now!", "", "  ", 'say "höh\n"', "a..", "{not json"]
SHAPES = [
    # frames, fps, height, width
    (17, 5.0, 256, 256),
    (33, 15.0, 544, 736),
    (17, 24.0, 192, 320),
    (17, 10.0, 832, 480),
    (2, 30.0, 736, 544),
    (1201, 10.0, 256, 320),
    (1201, 1.0, 960, 960),
    (26, 4.0, 320, 256),
    (13, 5.0, 480, 832),
    (38, 15.0, 704, 1280),
    (37, 23.976, 256, 256),
]


@pytest.fixture(scope="module")
def tokenizer(tiny_nano: Path) -> Any:
    return load_tokenizer(tiny_nano / "text_tokenizer")


def caption(
    tiny: Path, tokenizer: Any, prompt: str, view_point: str, shape: tuple[int, float, int, int], **settings: Any
) -> str:
    num_frames, fps, height, width = shape
    processor = Cosmos3Processor(
        tiny,
        fps=fps,
        num_frames=num_frames,
        height=height,
        width=width,
        view_point=view_point,
        tokenizer=tokenizer,
        **settings,
    )
    return processor.tokenize_pair(prompt, "blurry")[0].text


def theirs(prompt: str, view_point: str, shape: tuple[int, float, int, int]) -> str:
    from diffusers import Cosmos3OmniPipeline

    num_frames, fps, height, width = shape
    return Cosmos3OmniPipeline._build_action_json_prompt(
        prompt, view_point=view_point, num_frames=num_frames, fps=fps, height=height, width=width
    )


@pytest.mark.parametrize("compat", ["native", "diffusers"])
@pytest.mark.parametrize("view_point", VIEW_POINTS)
def test_the_caption_is_that_of_diffusers(view_point: str, compat: str, tiny_nano: Path, tokenizer: Any) -> None:
    for prompt in PROMPTS:
        for shape in SHAPES:
            ours = caption(tiny_nano, tokenizer, prompt, view_point, shape, compat=compat)
            assert ours == theirs(prompt, view_point, shape), (prompt, shape)


def test_the_caption_as_it_is_written(tiny_nano: Path, tokenizer: Any) -> None:
    text = caption(tiny_nano, tokenizer, "Put the cup down", "wrist_view", (17, 5.0, 256, 320))
    assert text == (
        '{"cinematography": {"framing": "This video is captured from a wrist-mounted camera."}, '
        '"actions": [{"time": "0:00-0:03", "description": "Put the cup down."}], "duration": "3s", "fps": 5.0, '
        '"resolution": {"H": 256, "W": 320}, "aspect_ratio": "4,3"}'
    )


def test_an_object_is_the_caption_itself_but_not_for_diffusers(tiny_nano: Path, tokenizer: Any) -> None:
    given = ' {"actions": [{"time": "0:00-0:01",  "description": "down"}]}'
    shape = SHAPES[0]
    assert caption(tiny_nano, tokenizer, given, "ego_view", shape) == given
    wrapped = caption(tiny_nano, tokenizer, given, "ego_view", shape, compat="diffusers")
    assert wrapped == theirs(given, "ego_view", shape)
    assert json.loads(wrapped)["actions"][0]["description"] == f"{given.strip()}."
    for other in ("[1, 2]", '"text"', '{"broken": '):
        assert caption(tiny_nano, tokenizer, other, "ego_view", shape) == theirs(other, "ego_view", shape)


@pytest.mark.parametrize("settings", [{}, {"compat": "diffusers"}, {"negative_metadata": "inverse"}], ids=str)
def test_the_negative_prompt_stays_as_it_is(settings: dict[str, Any], tiny_nano: Path, tokenizer: Any) -> None:
    processor = Cosmos3Processor(tiny_nano, num_frames=17, view_point="ego_view", tokenizer=tokenizer, **settings)
    for negative in ("blurry", "", '{"quality": "low"}', "ends."):
        prompt_ids = processor.tokenize_pair("go", negative)[1]
        assert prompt_ids.text == negative
        assert prompt_ids.origin == ("given" if negative else "empty")


def test_an_unknown_view_point_is_refused(tiny_nano: Path, tokenizer: Any) -> None:
    with pytest.raises(RequestError, match="view_point must be .*concat_view.*got 'bird_view'"):
        Cosmos3Processor(tiny_nano, view_point="bird_view", tokenizer=tokenizer)


def test_a_request_says_what_the_caption_speaks_of(tiny_nano: Path, tokenizer: Any) -> None:
    """The canvas, and the frames of the whole chunk, though not all of them are made."""
    from cosmos3_core.checkpoint.layout import CheckpointLayout

    request = GenerationRequest(**MINIMAL["policy"], action_chunk_size=18, fps=10.0, view_point="concat_view")
    resolved = resolve(request, CheckpointLayout.open(tiny_nano))
    assert (resolved.num_frames, resolved.height, resolved.width) == (17, 32, 48)
    prompts = resolved.prompt, resolved.negative_prompt
    folder = tiny_nano / "text_tokenizer"
    conditional, unconditional = tokenize_prompts(*prompts, resolved.prompt_format, tokenizer, folder)
    assert conditional.text == theirs("go on", "concat_view", (19, 10.0, 192, 320))
    assert (unconditional.text, unconditional.origin) == ("", "empty")
