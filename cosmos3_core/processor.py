"""Prompt -> token ids: metadata, chat template, special tokens.

What the model saw in training is a Qwen3-VL conversation whose assistant turn ends at once and is followed by
``<|vision_start|>``; duration, frame rate and resolution are part of the text. Behaviour is NVIDIA's cosmos-framework
where sources differ; ``compat="diffusers"`` gives diffusers 0.42.1's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos3_core import checks
from cosmos3_core.checkpoint.layout import read_negative_prompt
from cosmos3_core.errors import CorruptFileError, MissingFileError, RequestError
from cosmos3_core.presets import LIMITS
from cosmos3_core.request import (
    BEHAVIOURS,
    DIFFUSERS_BEHAVIOUR,
    FIELDS,
    NATIVE_BEHAVIOUR,
    NEGATIVE_METADATA,
    VIEW_POINTS,
    ResolvedRequest,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

# "give" is not ours: the model was trained with this spelling.
_SYSTEM_PROMPT = "You are a helpful assistant who will generate {what} from a give prompt."
_ASPECT_RATIOS = ((1, 1), (4, 3), (3, 4), (16, 9), (9, 16))

# The sentences of training, by view point.
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
    """One prompt's token ids, torch-free.

    Attributes:
        ids: template and closing special tokens included.
        text: what was tokenised, metadata included.
        origin: ``given``, ``empty``, ``checkpoint`` (its own default negative) or ``built-in`` (ours).
    """

    ids: tuple[int, ...]
    text: str
    origin: str


@dataclass(frozen=True)
class TokenizedPrompt:
    """One prompt as the transformer wants it.

    Attributes:
        text_ids: (1, S) int64, template and closing special tokens included.
        text_mask: (1, S) int64, all ones: prompts are never padded.
        text, origin: see :class:`PromptIds`.
    """

    text_ids: Tensor
    text_mask: Tensor
    text: str
    origin: str


class Cosmos3Processor:
    """Turns prompts into token ids for clips of one shape. The name and first arguments match PhyAI's processor.

    Args:
        tokenizer_dir: a checkpoint's ``text_tokenizer`` folder, or the checkpoint itself.
        fps: frames per second of the clip.
        num_frames: pixel frames of the clip; 1 is an image.
        height, width: pixels.
        append_metadata: tell the model duration, frame rate and resolution: as sentences behind a plain prompt, as
            keys of a JSON one.
        use_system_prompt: put the training system prompt first; None: only under ``compat="diffusers"``.
        negative_metadata: on the negative prompt, always as sentences: ``same`` as on the positive, ``none``, or
            ``inverse`` ("is not ... seconds long"); None: ``same``, ``inverse`` under ``compat="diffusers"``.
        compat: ``diffusers`` puts sentences behind JSON prompts too, and its default negative prompt is empty.
        view_point: of the camera that sees the actions that the prompt describes: the prompt becomes the caption that
            the model was shown with them. None: no actions.
        tokenizer: an already loaded one, to share between processors.

    Raises:
        MissingFileError, CorruptFileError: the tokenizer cannot be loaded.
    """

    def __init__(
        self,
        tokenizer_dir: str | Path,
        *,
        fps: float = 24.0,
        num_frames: int = 189,
        height: int = 720,
        width: int = 1280,
        append_metadata: bool = True,
        use_system_prompt: bool | None = None,
        negative_metadata: str | None = None,
        compat: str = NATIVE_BEHAVIOUR,
        view_point: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        like_diffusers = checks.choice("compat", compat, BEHAVIOURS) == DIFFUSERS_BEHAVIOUR
        FIELDS["fps"].check("fps", fps)
        FIELDS["num_frames"].check("num_frames", num_frames)
        checks.integer("height", height, 1, LIMITS.max_side_pixels)
        checks.integer("width", width, 1, LIMITS.max_side_pixels)
        path = Path(tokenizer_dir)
        self.tokenizer_dir = path / "text_tokenizer" if (path / "model_index.json").exists() else path
        self.fps, self.num_frames, self.height, self.width = fps, num_frames, height, width
        self.append_metadata = append_metadata
        # diffusers' own default; a checkpoint that says otherwise is asked in `resolve`.
        self.use_system_prompt = like_diffusers if use_system_prompt is None else use_system_prompt
        metadata = ("inverse" if like_diffusers else "same") if negative_metadata is None else negative_metadata
        self.negative_metadata = checks.choice("negative_metadata", metadata, NEGATIVE_METADATA)
        self.compat = compat
        self.view_point = view_point if view_point is None else checks.choice("view_point", view_point, VIEW_POINTS)
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(self.tokenizer_dir)

    @classmethod
    def for_request(
        cls, request: ResolvedRequest, tokenizer_dir: Path, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Cosmos3Processor:
        """Make the processor for a resolved request."""
        return cls(
            tokenizer_dir,
            fps=request.fps,
            num_frames=request.num_frames if request.action is None else request.action.chunk_size + 1,
            height=request.prompt_size[0],
            width=request.prompt_size[1],
            append_metadata=request.append_metadata,
            use_system_prompt=request.use_system_prompt,
            negative_metadata=request.negative_metadata,
            compat=request.compat,
            view_point=None if request.action is None else request.action.view_point,
            tokenizer=tokenizer,
        )

    def tokenize_pair(
        self, prompt: str, negative_prompt: str | None = None, *, device: torch.device | str = "cpu"
    ) -> tuple[TokenizedPrompt, TokenizedPrompt]:
        """Return the token ids of the conditional and the unconditional branch, as tensors.

        Args:
            prompt: plain text, or a JSON object as a string.
            negative_prompt: None = the checkpoint's own default if it has one, else the built-in one; "" = empty.
            device: where the ids go.

        Raises:
            RequestError: more tokens than the limit.
        """
        import torch

        def as_tensors(prompt_ids: PromptIds) -> TokenizedPrompt:
            text_ids = torch.tensor([prompt_ids.ids], dtype=torch.int64, device=device)
            return TokenizedPrompt(text_ids, torch.ones_like(text_ids), prompt_ids.text, prompt_ids.origin)

        conditional, unconditional = self.token_id_pair(prompt, negative_prompt)
        return as_tensors(conditional), as_tensors(unconditional)

    def token_id_pair(self, prompt: str, negative_prompt: str | None = None) -> tuple[PromptIds, PromptIds]:
        """:meth:`tokenize_pair` without torch.

        Raises:
            RequestError: more tokens than the limit.
        """
        negative, origin = self._negative(negative_prompt)
        conditional = self._encode("prompt", self._with_metadata(prompt), "given" if prompt else "empty")
        unconditional = self._encode("negative_prompt", self._with_negative_metadata(negative), origin)
        return conditional, unconditional

    @property
    def _is_image(self) -> bool:
        return self.num_frames == 1

    def _negative(self, negative_prompt: str | None) -> tuple[str, str]:
        if negative_prompt is None and self.compat == DIFFUSERS_BEHAVIOUR:
            negative_prompt = ""
        if negative_prompt is not None:
            return negative_prompt, "given" if negative_prompt else "empty"
        shipped = read_negative_prompt(self.tokenizer_dir.parent)
        return (shipped, "checkpoint") if shipped is not None else (DEFAULT_NEGATIVE_PROMPT, "built-in")

    def _with_metadata(self, prompt: str) -> str:
        fields = None if self.compat == DIFFUSERS_BEHAVIOUR else _json_object(prompt)
        if self.view_point is not None:
            # An object is the caption itself.
            return prompt if fields is not None else self._action_caption(prompt, self.view_point)
        if not self.append_metadata:
            return prompt
        return self._with_sentences(prompt, inverse=False) if fields is None else json.dumps(self._with_keys(fields))

    def _with_negative_metadata(self, negative: str) -> str:
        # Sentences even behind a JSON negative: that is how cosmos-framework appends them.
        if not self.append_metadata or self.negative_metadata == "none" or self.view_point is not None:
            return negative
        return self._with_sentences(negative, inverse=self.negative_metadata == "inverse")

    def _with_sentences(self, text: str, *, inverse: bool) -> str:
        no = "not " if inverse else ""
        sentences = [f"This {'image' if self._is_image else 'video'} is {no}of {self.height}x{self.width} resolution."]
        if not self._is_image:
            seconds = self.num_frames / self.fps
            sentences.insert(0, f"The video is {no}{seconds:.1f} seconds long and is {no}of {self.fps:.0f} FPS.")
        for sentence in sentences:
            text = text.rstrip(".")
            text = f"{text}. {sentence}" if text else sentence
        return text

    def _with_keys(self, fields: dict[str, Any]) -> dict[str, Any]:
        if self._is_image:
            kept = {key: value for key, value in fields.items() if key not in ("duration", "fps")}
            return {**kept, "resolution": {"H": self.height, "W": self.width}}
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
        """The structured caption of clips with actions, keys in the order of training (as diffusers 0.42.1 has it)."""
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

    def _encode(self, name: str, text: str, origin: str) -> PromptIds:
        conversation = [{"role": "user", "content": text}]
        if self.use_system_prompt:
            what = "images" if self._is_image else "videos"
            conversation.insert(0, {"role": "system", "content": _SYSTEM_PROMPT.format(what=what)})
        encoded = self.tokenizer.apply_chat_template(
            conversation, tokenize=True, add_generation_prompt=True, add_vision_id=False, return_dict=True
        )
        ids = [*encoded["input_ids"], *closing_ids(self.tokenizer, self.tokenizer_dir)]
        if len(ids) > LIMITS.max_text_tokens:
            raise RequestError(name, text, f"at most {LIMITS.max_text_tokens} tokens", f"shorten it from {len(ids)}")
        return PromptIds(tuple(ids), text, origin)


def load_tokenizer(tokenizer_dir: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a checkpoint's ``text_tokenizer`` folder; never looks anywhere else.

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
    """End of turn, then the token that opens the generated part; both count as text.

    Raises:
        CorruptFileError: the tokenizer lacks one of them.
    """
    start = tokenizer.convert_tokens_to_ids("<|vision_start|>")
    if start is None or start == tokenizer.unk_token_id:
        raise CorruptFileError(tokenizer_dir, "the tokenizer has no <|vision_start|> token")
    if tokenizer.eos_token_id is None:
        raise CorruptFileError(tokenizer_dir, "the tokenizer has no end-of-sequence token")
    return [tokenizer.eos_token_id, start]


def _json_object(prompt: str) -> dict[str, Any] | None:
    if not prompt.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(prompt)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
