"""Token ids of both prompts against diffusers' own tokenisation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cosmos3_core.phyai import Cosmos3Processor

PROMPTS = [
    "A red car drives along the coast.",
    "Ends with dots...",
    "no dot",
    "",
    "Ünïcödé \u6c34 \U0001f600 and <|im_end|> specials",
    '{"subject": "a red car", "duration": "3s"}',
    "two\nlines\n",
]


@pytest.mark.parametrize("num_frames", [1, 9, 189])
@pytest.mark.parametrize("negative_prompt", [None, "", "blurry, dark."])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("variant", ["nano", "edge"])
def test_token_ids_equal_diffusers(
    variant: str,
    prompt: str,
    negative_prompt: str | None,
    num_frames: int,
    request: pytest.FixtureRequest,
    diffusers_pipeline: Callable[[Path], Any],
) -> None:
    checkpoint = request.getfixturevalue(f"tiny_{variant}")
    pipeline = diffusers_pipeline(checkpoint).pipeline
    for use_system_prompt in (False, True):
        for fps in (10.0, 23.976, 30.0):
            shape: dict[str, Any] = {"num_frames": num_frames, "height": 720, "width": 1280, "fps": fps}
            theirs = pipeline.tokenize_prompt(prompt, negative_prompt, use_system_prompt=use_system_prompt, **shape)
            processor = Cosmos3Processor(
                checkpoint,
                use_system_prompt=use_system_prompt,
                negative_metadata="inverse",
                compat="diffusers",
                tokenizer=pipeline.text_tokenizer,
                **shape,
            )
            ours = processor.tokenize_pair(prompt, negative_prompt)
            assert [list(prompt_ids.text_ids[0].tolist()) for prompt_ids in ours] == [list(ids) for ids in theirs]
