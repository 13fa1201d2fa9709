"""The tiny checkpoint's ``text_tokenizer/``: a small byte-level BPE with the real special tokens and chat format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

# Qwen3-VL's, in the order of their ids, which follow the words'. Generation appends <|im_end|> and <|vision_start|>.
_QWEN_SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
# Also whole tokens, but kept by decode(skip_special_tokens=True).
_QWEN_MARKUP_TOKENS = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
).split()

# Edge has another vocabulary, with the specials in front: <|im_end|> is 11, <|vision_start|> is 20.
_EDGE_SPECIAL_TOKENS = (
    "<unk> <s> </s> <|endoftext|> <SPECIAL_4> <SPECIAL_5> <SPECIAL_6> <SPECIAL_7> <SPECIAL_8> <SPECIAL_9> "
    "<|im_start|> <|im_end|> <think> </think> <tool_call> </tool_call> <|image_pad|> <|video_pad|> <SPECIAL_18> "
    "<SPECIAL_19> <|vision_start|> <|vision_end|>"
).split()

# How Qwen2 cuts text into words, within which bytes are merged: contractions, letters with at most one other character
# in front, single digits, punctuation, line ends, blanks.
_WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# No system message unless the caller brings one, as in Qwen3-VL.
_CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content if part.type == 'text' %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_CORPUS = """\
You are a helpful assistant who will generate videos from a given prompt.
You are a helpful assistant who will generate images from a given prompt.
The video is 7.9 seconds long and is of 24 FPS. This video is of 720x1280 resolution.
The video is not 7.9 seconds long and is not of 24 FPS. This video is not of 720x1280 resolution.
This image is of 1024x1024 resolution. This image is not of 1024x1024 resolution.
This video is captured from a first-person perspective looking at the scene.
This video contains concatenated views from multiple camera perspectives.
{"cinematography": {"framing": "wide"}, "actions": [{"time": "0:00-0:03", "description": "The arm lifts the cup."}]}
A robot arm picks up a red apple from the wooden table and places it in the white bowl.
The camera moves slowly through a sunlit kitchen while steam rises from the kettle.
A small boat drifts on a calm lake at sunset; the mountains behind it turn orange and violet.
Two children are running along the beach, and the waves wash over their footprints.
An autonomous car waits at the crossing until the last pedestrian has left the road.
Rain falls on the street outside, the lights of the shops are reflected in the puddles.
""".splitlines()

_NUM_BASE_TOKENS = 460


def write_tiny_tokenizer(directory: Path, tokenizer_class: str) -> int:
    """Write the tokenizer's files into ``directory``, which must exist.

    Any text can be tokenized; decoding returns it in Unicode normal form C, as with the published tokenizers.

    Args:
        tokenizer_class: "Qwen2TokenizerFast" (Nano and Super) or "PreTrainedTokenizerFast" (Edge).

    Returns:
        The number of tokens. The model's ``vocab_size`` must be as large; published ones are larger.
    """
    is_qwen = tokenizer_class == "Qwen2TokenizerFast"
    tokenizer = _train_byte_bpe([] if is_qwen else _EDGE_SPECIAL_TOKENS)
    if is_qwen:
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in _QWEN_SPECIAL_TOKENS])
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in _QWEN_MARKUP_TOKENS])
    serialized = json.loads(tokenizer.to_str())
    config = _tokenizer_config(serialized["added_tokens"])
    if not is_qwen:
        config |= {"bos_token": "<s>", "unk_token": "<unk>", "tokenizer_class": tokenizer_class}
    _write_json(directory / "tokenizer.json", serialized)
    _write_json(directory / "tokenizer_config.json", config)
    (directory / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    if is_qwen:
        # The same vocabulary in the format of GPT-2.
        _write_json(directory / "vocab.json", serialized["model"]["vocab"])
        lines = [" ".join(pair) for pair in serialized["model"]["merges"]]
        (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    return tokenizer.get_vocab_size()


def _train_byte_bpe(first_tokens: list[str]) -> Tokenizer:
    """Return a byte-level BPE of the corpus. ``first_tokens`` are special and get ids 0, 1, ..."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_WORD_PATTERN), behavior="isolated")
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of_words])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(first_tokens) + _NUM_BASE_TOKENS,
        special_tokens=[AddedToken(token, normalized=False) for token in first_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _tokenizer_config(added_tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """Return ``tokenizer_config.json`` as in Qwen3-VL."""
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added_tokens
        },
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 262144,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
