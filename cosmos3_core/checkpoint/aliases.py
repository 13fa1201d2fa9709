"""Alternative names of Cosmos3's transformer tensors -> their published names.

Sources: the state dict that NVIDIA trains and exports (cosmos-framework's conversion script renames the same way), and
the names that vLLM-Omni and SGLang accept. The table matches whole names, so that no tensor of the VAEs is touched.
No torch here.
"""

from __future__ import annotations

import re

WRAPPERS = ("model.", "net.", "transformer.", "language_model.")
"""Wrapper modules whose names an export may carry in front; all of them are stripped."""

_ATTENTION = r"(layers\.\d+\.self_attn)"

_RENAMES: tuple[tuple[str, str], ...] = (
    # Heads: "x to language model" and back.
    (r"vae2llm\.(weight|bias)", r"proj_in.\1"),
    (r"llm2vae\.(weight|bias)", r"proj_out.\1"),
    (r"action2llm\.(fc\.weight|bias\.weight)", r"action_proj_in.\1"),
    (r"llm2action\.(fc\.weight|bias\.weight)", r"action_proj_out.\1"),
    (r"sound2llm\.(weight|bias)", r"audio_proj_in.\1"),
    (r"llm2sound\.(weight|bias)", r"audio_proj_out.\1"),
    (r"(?:sound|audio)_modality_embed(?:\.weight)?", "audio_modality_embed"),
    (r"action_modality_embed(?:\.weight)?", "action_modality_embed"),
    # The time embedder as a Sequential: Linear, SiLU, Linear.
    (r"time_embedder\.mlp\.0\.(weight|bias)", r"time_embedder.linear_1.\1"),
    (r"time_embedder\.mlp\.2\.(weight|bias)", r"time_embedder.linear_2.\1"),
    # Attention as trained: Qwen's names for the understanding tower, a suffix for the generation tower.
    (_ATTENTION + r"\.([qkv])_proj\.(weight|bias)", r"\1.to_\2.\3"),
    (_ATTENTION + r"\.o_proj\.(weight|bias)", r"\1.to_out.\2"),
    (_ATTENTION + r"\.([qk])_norm\.weight", r"\1.norm_\2.weight"),
    (_ATTENTION + r"\.([qkv])_proj_moe_gen\.(weight|bias)", r"\1.add_\2_proj.\3"),
    (_ATTENTION + r"\.o_proj_moe_gen\.(weight|bias)", r"\1.to_add_out.\2"),
    (_ATTENTION + r"\.([qk])_norm_moe_gen\.weight", r"\1.norm_added_\2.weight"),
)
_PATTERNS = tuple((re.compile(pattern), replacement) for pattern, replacement in _RENAMES)

# A learnt position table that the unified 3D positions replaced; no released model reads it.
_IGNORED = re.compile(r"action_pos_embed(\..+)?")


def find_published_name(stored: str) -> str | None:
    """Return the published name of a tensor stored as ``stored``; None for one that is deliberately not read."""
    name = stored
    while wrapper := next((wrapper for wrapper in WRAPPERS if name.startswith(wrapper)), None):
        name = name.removeprefix(wrapper)
    if _IGNORED.fullmatch(name):
        return None
    for pattern, replacement in _PATTERNS:
        if match := pattern.fullmatch(name):
            return match.expand(replacement)
    return name
