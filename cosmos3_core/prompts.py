"""Prompt -> token ids: metadata, chat template, special tokens. No torch here.

The model was trained on Qwen3-VL conversations whose assistant turn ends at once and is followed by
``<|vision_start|>``; duration, frame rate and resolution are part of the text. Where sources differ, this follows
NVIDIA's cosmos-framework; ``compat="diffusers"`` follows diffusers 0.42.1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos3_core.checkpoint.layout import read_negative_prompt
from cosmos3_core.errors import CorruptFileError, MissingFileError, RequestError
from cosmos3_core.presets import LIMITS
from cosmos3_core.request import DIFFUSERS_BEHAVIOUR, VIEW_POINTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# "give" is not ours: the model was trained with this spelling.
_SYSTEM_PROMPT = "You are a helpful assistant who will generate {what} from a give prompt."
_ASPECT_RATIOS = ((1, 1), (4, 3), (3, 4), (16, 9), (9, 16))

# The sentences of the training captions, by view point.
_FRAMINGS = dict(
    zip(
        VIEW_POINTS,
        (
            "This video is captured from a first-person perspective looking at the scene.",
            "This video is captured from a third-person perspective looking towards the agent from the front.",
            "This video is captured from a wrist-mounted camera.",
            "This video contains concatenated views from multiple camera perspectives.",
        ),
        strict=True,
    )
)

DEFAULT_NEGATIVE_PROMPT = json.dumps(
    {
        "subjects": "deformed or duplicated bodies, extra limbs, melting objects, faces that change between frames",
        "motion": "frozen frames, stutter, jumps, objects that appear or vanish without cause, broken physics",
        "camera": "shake, sudden cuts, focus that hunts",
        "image": "blur, noise, compression blocks, banding, flicker, wrong exposure, washed out or garish colours",
        "overlays": "text, subtitles, watermarks, logos, borders",
    }
)


@dataclass(frozen=True)
class PromptIds:
    """One prompt's token ids.

    Attributes:
        ids: with the chat template's and the closing special tokens.
        text: the text that was tokenized, with its metadata.
        origin: ``given``, ``empty``, ``checkpoint`` (its own default negative) or ``built-in`` (ours).
    """

    ids: tuple[int, ...]
    text: str
    origin: str


@dataclass(frozen=True)
class PromptFormat:
    """The clip that a prompt describes, and the form in which the model reads the prompt.

    Attributes:
        num_frames: pixel frames of the clip; 1 is an image.
        height, width: pixels.
        fps: frames per second.
        append_metadata: add duration, frame rate and resolution: sentences after a plain prompt, keys of a JSON one.
        use_system_prompt: put the training system prompt first.
        negative_metadata: metadata of the negative prompt, always as sentences: ``same`` as the prompt's, ``none``, or
            ``inverse`` ("is not ... seconds long").
        compat: ``diffusers`` adds sentences to JSON prompts too, and its default negative prompt is empty.
        view_point: camera of a clip with actions, whose prompt becomes the caption of training; None without actions.
    """

    num_frames: int
    height: int
    width: int
    fps: float
    append_metadata: bool
    use_system_prompt: bool
    negative_metadata: str
    compat: str
    view_point: str | None

    @property
    def is_image(self) -> bool:
        """Whether the clip is a single frame."""
        return self.num_frames == 1

    def write_prompt(self, prompt: str) -> str:
        """Return the text that the model reads for a prompt."""
        fields = None if self.compat == DIFFUSERS_BEHAVIOUR else read_json_prompt(prompt)
        if self.view_point is not None:
            # A JSON object already is the caption.
            return prompt if fields is not None else self._action_caption(prompt, self.view_point)
        if not self.append_metadata:
            return prompt
        return self._add_sentences(prompt) if fields is None else json.dumps(self._add_keys(fields))

    def write_negative(self, negative: str) -> str:
        """Return the text that the model reads for a negative prompt."""
        # Sentences even after a JSON negative: that is how cosmos-framework appends them.
        if not self.append_metadata or self.negative_metadata == "none" or self.view_point is not None:
            return negative
        return self._add_sentences(negative, no="not " if self.negative_metadata == "inverse" else "")

    def _add_sentences(self, text: str, no: str = "") -> str:
        sentences = [f"This {'image' if self.is_image else 'video'} is {no}of {self.height}x{self.width} resolution."]
        if not self.is_image:
            seconds = self.num_frames / self.fps
            sentences.insert(0, f"The video is {no}{seconds:.1f} seconds long and is {no}of {self.fps:.0f} FPS.")
        for sentence in sentences:
            text = text.rstrip(".")
            text = f"{text}. {sentence}" if text else sentence
        return text

    def _add_keys(self, fields: dict[str, Any]) -> dict[str, Any]:
        if self.is_image:
            others = {key: value for key, value in fields.items() if key not in ("duration", "fps")}
            return {**others, "resolution": {"H": self.height, "W": self.width}}
        return {**fields, **self._clip_keys()}

    def _clip_keys(self) -> dict[str, Any]:
        ratio = self.width / self.height
        across, down = min(_ASPECT_RATIOS, key=lambda pair: abs(pair[0] / pair[1] - ratio))
        return {
            "duration": f"{int(self.num_frames / self.fps)}s",
            "fps": float(self.fps),
            "resolution": {"H": self.height, "W": self.width},
            "aspect_ratio": f"{across},{down}",
        }

    def _action_caption(self, prompt: str, view_point: str) -> str:
        """Return the caption of a clip with actions as JSON, keys in the order of training (diffusers 0.42.1)."""
        description = prompt.strip()
        if description and not description.endswith((".", "!", "?")):
            description = f"{description}."
        minutes, seconds = divmod(round(self.num_frames / self.fps), 60)
        caption = {
            "cinematography": {"framing": _FRAMINGS[view_point]},
            "actions": [{"time": f"0:00-{minutes}:{seconds:02d}", "description": description}],
            **self._clip_keys(),
        }
        return json.dumps(caption)


def tokenize_prompts(
    prompt: str,
    negative_prompt: str | None,
    prompt_format: PromptFormat,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_dir: Path,
) -> tuple[PromptIds, PromptIds]:
    """Return the token ids of the conditional and the unconditional branch.

    Args:
        prompt: plain text, or a JSON object as a string.
        negative_prompt: None takes the checkpoint's own default, or ours if it has none.
        tokenizer: from :func:`load_tokenizer`.
        tokenizer_dir: the folder that it was loaded from.

    Raises:
        RequestError: a prompt has more tokens than the limit.
    """
    system = {"role": "system", "content": _SYSTEM_PROMPT.format(what="images" if prompt_format.is_image else "videos")}

    def encode(name: str, text: str, origin: str) -> PromptIds:
        user = {"role": "user", "content": text}
        messages = [system, user] if prompt_format.use_system_prompt else [user]
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, add_vision_id=False, return_dict=True
        )
        ids = (*encoded["input_ids"], *closing_ids(tokenizer, tokenizer_dir))
        if len(ids) > LIMITS.max_text_tokens:
            raise RequestError(name, text, f"at most {LIMITS.max_text_tokens} tokens", f"shorten it from {len(ids)}")
        return PromptIds(ids, text, origin)

    if negative_prompt is None and prompt_format.compat == DIFFUSERS_BEHAVIOUR:
        negative_prompt = ""
    negative, origin = negative_prompt, "given" if negative_prompt else "empty"
    if negative is None:
        negative, origin = read_negative_prompt(tokenizer_dir.parent), "checkpoint"
    if negative is None:
        negative, origin = DEFAULT_NEGATIVE_PROMPT, "built-in"
    conditional = encode("prompt", prompt_format.write_prompt(prompt), "given" if prompt else "empty")
    return conditional, encode("negative_prompt", prompt_format.write_negative(negative), origin)


def load_tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer from a checkpoint's ``text_tokenizer`` folder, never from the network.

    Raises:
        MissingFileError: the folder or its ``tokenizer.json`` is not there.
        CorruptFileError: the files cannot be read as a tokenizer, or it has no chat template.
    """
    if not (tokenizer_dir / "tokenizer.json").is_file():
        raise MissingFileError(
            tokenizer_dir / "tokenizer.json", "no such file", "The checkpoint needs its text_tokenizer folder."
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on broken files
        raise CorruptFileError(tokenizer_dir, f"not a readable tokenizer: {error}") from error
    if not tokenizer.chat_template:
        raise CorruptFileError(tokenizer_dir, "the tokenizer has no chat template", "Add its chat_template.jinja.")
    closing_ids(tokenizer, tokenizer_dir)
    return tokenizer


def closing_ids(tokenizer: PreTrainedTokenizerBase, tokenizer_dir: Path) -> list[int]:
    """Return the ids of the end of turn and of the token that opens the generated part; both count as text.

    Raises:
        CorruptFileError: the tokenizer lacks one of them.
    """
    start = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    if start is None or start == tokenizer.unk_token_id:
        raise CorruptFileError(tokenizer_dir, "the tokenizer has no <|vision_start|> token")
    if tokenizer.eos_token_id is None:
        raise CorruptFileError(tokenizer_dir, "the tokenizer has no end-of-sequence token")
    return [tokenizer.eos_token_id, start]


def read_json_prompt(prompt: str) -> dict[str, Any] | None:
    """Return the object of a prompt that is JSON, as the models' own captions are; None for a plain text."""
    if not prompt.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(prompt)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
