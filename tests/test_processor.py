"""Prompts -> text and ids, the native behaviour (diffusers' is in parity/)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from cosmos3_core.errors import CorruptFileError, MissingFileError, RequestError
from cosmos3_core.phyai import Cosmos3Processor
from cosmos3_core.prompts import DEFAULT_NEGATIVE_PROMPT, load_tokenizer

SENTENCES = "The video is 7.9 seconds long and is of 24 FPS. This video is of 720x1280 resolution."


@pytest.fixture(scope="module")
def tokenizer(tiny_nano: Path) -> Any:
    return load_tokenizer(tiny_nano / "text_tokenizer")


def test_ids_are_the_chat_template_then_end_of_turn_then_vision_start(tiny_nano: Path, tokenizer: Any) -> None:
    cond, _ = Cosmos3Processor(tiny_nano, append_metadata=False).tokenize_pair("A car")
    reference = AutoTokenizer.from_pretrained(tiny_nano / "text_tokenizer")
    text = "<|im_start|>user\nA car<|im_end|>\n<|im_start|>assistant\n<|im_end|><|vision_start|>"
    assert cond.text_ids[0].tolist() == reference(text)["input_ids"]
    assert cond.text_ids.shape == cond.text_mask.shape
    assert cond.text_ids.dtype == cond.text_mask.dtype == torch.int64
    assert bool((cond.text_mask == 1).all())


def test_the_system_prompt_only_when_asked(tiny_nano: Path, tokenizer: Any) -> None:
    for num_frames, what in ((189, "videos"), (1, "images")):
        processor = Cosmos3Processor(tiny_nano, num_frames=num_frames, use_system_prompt=True, tokenizer=tokenizer)
        text = tokenizer.decode(processor.tokenize_pair("A car")[0].text_ids[0])
        assert f"system\nYou are a helpful assistant who will generate {what} from a give prompt." in text
    plain = Cosmos3Processor(tiny_nano, tokenizer=tokenizer).tokenize_pair("A car")[0]
    assert "system" not in tokenizer.decode(plain.text_ids[0])


def test_plain_prompts_get_sentences_and_the_negative_gets_the_same(tiny_nano: Path, tokenizer: Any) -> None:
    cond, uncond = Cosmos3Processor(tiny_nano, tokenizer=tokenizer).tokenize_pair("A car.", "blurry")
    assert cond.text == f"A car. {SENTENCES}"
    assert uncond.text == f"blurry. {SENTENCES}"
    image, _ = Cosmos3Processor(tiny_nano, num_frames=1, tokenizer=tokenizer).tokenize_pair("A car")
    assert image.text == "A car. This image is of 720x1280 resolution."


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("same", f"blurry. {SENTENCES}"),
        ("none", "blurry"),
        ("inverse", "blurry. The video is not 7.9 seconds long and is not of 24 FPS. "
                    "This video is not of 720x1280 resolution."),
    ],
)  # fmt: skip
def test_metadata_on_the_negative(mode: str, expected: str, tiny_nano: Path, tokenizer: Any) -> None:
    processor = Cosmos3Processor(tiny_nano, negative_metadata=mode, tokenizer=tokenizer)
    assert processor.tokenize_pair("A car", "blurry")[1].text == expected


def test_json_prompts_get_keys(tiny_nano: Path, tokenizer: Any) -> None:
    prompt = json.dumps({"subject": "a car", "duration": "99s"})
    cond, _ = Cosmos3Processor(tiny_nano, tokenizer=tokenizer).tokenize_pair(prompt)
    assert json.loads(cond.text) == {
        "subject": "a car",
        "duration": "7s",
        "fps": 24.0,
        "resolution": {"H": 720, "W": 1280},
        "aspect_ratio": "16,9",
    }
    image, _ = Cosmos3Processor(tiny_nano, num_frames=1, tokenizer=tokenizer).tokenize_pair(prompt)
    assert json.loads(image.text) == {"subject": "a car", "resolution": {"H": 720, "W": 1280}}
    for not_an_object in ('{"broken": ', "[1, 2]", "{curly} words"):
        text = Cosmos3Processor(tiny_nano, tokenizer=tokenizer).tokenize_pair(not_an_object)[0].text
        assert text.endswith(SENTENCES)


@pytest.mark.parametrize(
    ("height", "width", "ratio"), [(720, 1280, "16,9"), (960, 960, "1,1"), (832, 1104, "4,3"), (1280, 720, "9,16")]
)
def test_the_nearest_aspect_ratio(height: int, width: int, ratio: str, tiny_nano: Path, tokenizer: Any) -> None:
    processor = Cosmos3Processor(tiny_nano, height=height, width=width, tokenizer=tokenizer)
    assert json.loads(processor.tokenize_pair("{}")[0].text)["aspect_ratio"] == ratio


def test_the_negative_prompt_says_where_it_came_from(tiny_nano: Path, tiny_edge: Path, tokenizer: Any) -> None:
    nano = Cosmos3Processor(tiny_nano / "text_tokenizer", tokenizer=tokenizer)
    _, built_in = nano.tokenize_pair("A car")
    assert built_in.origin == "built-in"
    assert built_in.text.startswith(DEFAULT_NEGATIVE_PROMPT)
    assert isinstance(json.loads(DEFAULT_NEGATIVE_PROMPT), dict)
    assert nano.tokenize_pair("A car", "")[1].origin == "empty"
    assert nano.tokenize_pair("A car", "")[1].text == SENTENCES
    assert nano.tokenize_pair("A car", "blurry")[1].origin == "given"
    _, shipped = Cosmos3Processor(tiny_edge / "text_tokenizer").tokenize_pair("A car")
    assert shipped.origin == "checkpoint"
    assert shipped.text.startswith(json.dumps(json.loads((tiny_edge / "assets" / "negative_prompt.json").read_text())))


def test_bad_settings_and_prompts_are_refused(tiny_nano: Path, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="negative_metadata"):
        Cosmos3Processor(tiny_nano, negative_metadata="some", tokenizer=tokenizer)
    with pytest.raises(MissingFileError, match="tokenizer.json"):
        Cosmos3Processor(tmp_path)
    with pytest.raises(RequestError, match="at most 16384 tokens"):
        Cosmos3Processor(tiny_nano, tokenizer=tokenizer).tokenize_pair("\u6c34" * 20_000)

    class NoSpecials:
        unk_token_id = None
        eos_token_id = None
        chat_template = "x"

        def convert_tokens_to_ids(self, token: str) -> None:
            return None

        def apply_chat_template(self, *args: Any, **kwargs: Any) -> dict[str, list[int]]:
            return {"input_ids": [1]}

    with pytest.raises(CorruptFileError, match="vision_start"):
        Cosmos3Processor(tiny_nano, tokenizer=NoSpecials()).tokenize_pair("A car")  # type: ignore[arg-type]
