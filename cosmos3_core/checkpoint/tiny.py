"""Build a tiny checkpoint in the published layout: a few megabytes that every part of the code can run on.

    python -m cosmos3_core.checkpoint.tiny DIRECTORY --variant nano --seed 0

The weights are random, the rest is real: file names, config keys, tensor names, special tokens and the geometry (48
latent channels, 16 x 16 x 4 compression) are those of nvidia/Cosmos3-Nano, -Super and -Edge. The same seed gives the
same bytes every time, and nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from cosmos3_core import checks
from cosmos3_core.checkpoint.random_weights import random_tensors
from cosmos3_core.checkpoint.tensors import TensorTable, audio_vae_tensors, transformer_tensors, video_vae_tensors
from cosmos3_core.checkpoint.tiny_tokenizer import write_tiny_tokenizer
from cosmos3_core.checkpoint.tiny_variants import (
    TINY_AUDIO_VAE,
    TINY_VARIANTS,
    VISION_ENCODER_JSON,
    TinyVariant,
    audio_vae_json,
    model_index_json,
    scheduler_json,
    tiny_video_vae,
    transformer_json,
    video_vae_json,
)
from cosmos3_core.errors import RequestError

_WEIGHTS = "diffusion_pytorch_model"
_MAX_SHARD_BYTES = 1_500_000  # small enough that the transformer is split, as the published ones are
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_tiny_checkpoint(
    directory: str | Path, variant: str = "nano", seed: int = 0, *, dtype: str = "float32"
) -> Path:
    """Write a tiny checkpoint of one variant.

    Args:
        directory: directory to write; created if it does not exist.
        variant: "nano", "super" or "edge".
        seed: seed of the weights; the tokenizer is the same for every seed.
        dtype: dtype of the weights on disk: "float32", or "bfloat16" as published.

    Returns:
        ``directory`` as a path.

    Raises:
        RequestError: the variant or dtype is unknown, or the directory is not empty.
    """
    checks.choice("variant", variant, tuple(TINY_VARIANTS))
    checks.choice("dtype", dtype, tuple(_DTYPES))
    directory = Path(directory)
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        hint = "nothing is overwritten: choose another directory, or remove this one first"
        raise RequestError("directory", str(directory), "a new or an empty directory", hint)
    directory.mkdir(parents=True, exist_ok=True)
    _write_checkpoint(directory, TINY_VARIANTS[variant], seed, _DTYPES[dtype])
    return directory


def _write_checkpoint(directory: Path, variant: TinyVariant, seed: int, dtype: torch.dtype) -> None:
    def folder(name: str) -> Path:
        (directory / name).mkdir()
        return directory / name

    def weights(shapes: TensorTable) -> dict[str, torch.Tensor]:
        return dict(random_tensors(shapes, seed, dtype=dtype))

    _write_json(directory / "model_index.json", model_index_json(variant))

    transformer = folder("transformer")
    _write_json(transformer / "config.json", transformer_json(variant, str(dtype).removeprefix("torch.")))
    _write_shards(transformer, weights(transformer_tensors(variant.transformer)))

    vae, vae_config = folder("vae"), tiny_video_vae(seed)
    _write_json(vae / "config.json", video_vae_json(vae_config))
    _write_safetensors(vae / f"{_WEIGHTS}.safetensors", weights(video_vae_tensors(vae_config)))

    if variant.transformer.sound_gen:
        sound = folder("sound_tokenizer")
        _write_json(sound / "config.json", audio_vae_json(TINY_AUDIO_VAE))
        _write_safetensors(sound / f"{_WEIGHTS}.safetensors", weights(audio_vae_tensors(TINY_AUDIO_VAE)))

    num_tokens = write_tiny_tokenizer(folder("text_tokenizer"), variant.tokenizer_class)
    assert num_tokens <= variant.transformer.vocab_size, num_tokens

    _write_json(folder("scheduler") / "scheduler_config.json", scheduler_json(variant.scheduler))
    _write_json(folder("vision_encoder") / "config.json", VISION_ENCODER_JSON)
    if variant.negative_prompt is not None:
        _write_json(folder("assets") / "negative_prompt.json", variant.negative_prompt)


def _write_shards(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write several weight files, and the index from tensor to file."""
    shards = list(_shards(tensors))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{_WEIGHTS}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(directory / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    _write_json(directory / f"{_WEIGHTS}.safetensors.index.json", index)


def _shards(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """Cut ``tensors`` in their order into shards of bounded size."""
    shard: dict[str, torch.Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors.items():
        if shard and num_bytes + tensor.nbytes > _MAX_SHARD_BYTES:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = tensor
        num_bytes += tensor.nbytes
    yield shard


def _write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    # The metadata is what diffusers and transformers look for before they read a file. Not save_file: it makes files
    # that only their owner may read.
    path.write_bytes(save(tensors, metadata={"format": "pt"}))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, shown at the top of this file."""
    parser = argparse.ArgumentParser(
        prog="python -m cosmos3_core.checkpoint.tiny", description="Write a tiny random checkpoint."
    )
    parser.add_argument("directory", type=Path, help="a new or an empty directory")
    parser.add_argument(
        # --family is its former name.
        "--variant",
        "--family",
        default="nano",
        help=f"{', '.join(TINY_VARIANTS)} (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help=f"{', '.join(_DTYPES)} (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        directory = build_tiny_checkpoint(options.directory, options.variant, options.seed, dtype=options.dtype)
    except RequestError as error:
        parser.error(str(error))
    num_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    print(f"{directory}: tiny {options.variant}, {num_bytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
