"""PromptTokenizer: prompts -> token ids, on the CPU and without torch."""

from __future__ import annotations

import asyncio
import os

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.prompts import load_tokenizer, tokenize_prompts
from cosmos3_core.request import ResolvedRequest
from deployments.messages import RequestContext, TokenizedPair
from deployments.observability.logs import watch_stage


class PromptTokenizer:
    """Serve deployment that tokenizes prompts."""

    def __init__(self, checkpoint: str) -> None:
        self._directory = CheckpointLayout.open(checkpoint).component_dir("text_tokenizer")
        self._tokenizer = load_tokenizer(self._directory)

    async def tokenize(self, context: RequestContext, request: ResolvedRequest) -> TokenizedPair:
        """Tokenize the prompt and the negative prompt; raise RequestError for too many tokens."""
        context.remaining_s("tokenize")
        with watch_stage(context, "tokenize"):
            return await asyncio.to_thread(self._tokenize, request)

    def _tokenize(self, request: ResolvedRequest) -> TokenizedPair:
        conditional, unconditional = tokenize_prompts(
            request.prompt, request.negative_prompt, request.prompt_format, self._tokenizer, self._directory
        )
        return TokenizedPair(conditional.ids, unconditional.ids, unconditional.origin, os.getpid())
