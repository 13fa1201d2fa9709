"""Everything a user can get wrong: a typed error that names the field, what was given and what is allowed, raised
before anything large is allocated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos3_core.engine import Engine
from cosmos3_core.errors import (
    CapabilityError,
    ClosedError,
    CorruptFileError,
    MissingFileError,
    RequestError,
    TensorMismatchError,
)
from cosmos3_core.generate import generate, main
from cosmos3_core.phyai import Cosmos3T2VRequest
from cosmos3_core.request import GenerationRequest
from cosmos3_core.resolve import resolve


class LargestTensor(TorchDispatchMode):
    """Watches every operation for the largest tensor that it makes."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.num_bytes = max(self.num_bytes, tensor.numel() * tensor.element_size())
        return result


def test_the_watch_on_allocations_sees_an_allocation() -> None:
    with LargestTensor() as largest:
        torch.ones(1 << 20)
    assert largest.num_bytes == 4 << 20


def never_called(*args: Any) -> Any:
    raise AssertionError("the transformer ran on a request that had to be refused")


BAD_REQUESTS: list[tuple[dict[str, Any], str, str, str]] = [
    # fields, field named, given shown, allowed said
    ({"prompt": ""}, "prompt", "''", "at least one visible character"),
    ({"prompt": " \n\t"}, "prompt", "\\n", "at least one visible character"),
    ({"prompt": 5}, "prompt", "5", "a string"),
    ({"prompt": "x" * 200_000}, "prompt", "200000 characters", "at most 50000 characters"),
    ({"prompt": "\U0001f600" * 40_000}, "prompt", "characters)", "at most 16384 tokens"),
    ({"negative_prompt": "x" * 200_000}, "negative_prompt", "200000 characters", "at most 50000 characters"),
    ({"height": 100}, "height", "100", "a multiple of 16"),
    ({"width": 8}, "width", "8", "at least 16"),
    ({"width": -64}, "width", "-64", "at least 16"),
    ({"height": 64.0}, "height", "64.0", "a multiple of 16"),
    ({"height": 16_000, "width": 16_000, "num_frames": 189}, "num_frames x height x width", "16000", "video tokens"),
    ({"num_frames": 0}, "num_frames", "0", "1 to 1201"),
    ({"num_frames": -3}, "num_frames", "-3", "1 to 1201"),
    ({"num_frames": 10**9}, "num_frames", "1000000000", "1 to 1201"),
    ({"num_frames": 2.5}, "num_frames", "2.5", "a whole number"),
    ({"num_frames": True}, "num_frames", "True", "a whole number"),
    ({"num_inference_steps": 0}, "num_inference_steps", "0", "1 to 1000"),
    ({"num_inference_steps": 10**6}, "num_inference_steps", "1000000", "1 to 1000"),
    ({"guidance_scale": float("nan")}, "guidance_scale", "nan", "0 to 20"),
    ({"guidance_scale": float("inf")}, "guidance_scale", "inf", "0 to 20"),
    ({"guidance_scale": -1.0}, "guidance_scale", "-1.0", "0 to 20"),
    ({"guidance_scale": "6"}, "guidance_scale", "'6'", "0 to 20"),
    ({"fps": 0}, "fps", "0", "1 to 120"),
    ({"fps": float("nan")}, "fps", "nan", "1 to 120"),
    ({"flow_shift": 0.0}, "flow_shift", "0.0", "to 100"),
    ({"seed": -1}, "seed", "-1", "0 to"),
    ({"prompt": "\ud800 half a pair"}, "prompt", "half a pair", "surrogate"),
    ({"use_system_prompt": "yes"}, "use_system_prompt", "'yes'", "true or false"),
    ({"append_metadata": 1}, "append_metadata", "1", "true or false"),
    ({"schedule": ["native"]}, "schedule", "native", "karras"),
    ({"seed": 2**64}, "seed", str(2**64), "0 to"),
    ({"schedule": "cosine"}, "schedule", "'cosine'", "karras"),
    ({"compat": "vllm"}, "compat", "'vllm'", "diffusers"),
    ({"negative_metadata": "some"}, "negative_metadata", "'some'", "inverse"),
    ({"num_frames": 10**5000}, "num_frames", "too large to print", "1 to 1201"),
    ({"guidance_scale": 10**400}, "guidance_scale", "characters)", "0 to 20"),
    ({"height": 16_400}, "height", "16400", "at most 16384"),
    ({"seed": None}, "seed", "None", "a whole number"),
    ({"output_quality": 50}, "output_quality", "50", "left out for mp4"),
    ({"num_frames": 1, "output_quality": 50}, "output_quality", "50", "for jpeg and webp"),
    ({"num_frames": 1, "output": "webp", "output_quality": 101}, "output_quality", "101", "0 to 100"),
    ({"crf": 52}, "crf", "52", "a number from 0 to 51"),
    ({"crf": "18"}, "crf", "'18'", "a number from 0 to 51"),
    ({"num_frames": 1, "crf": 20}, "crf", "20", "left out for png"),
    ({"num_frames": 1, "output": "webp", "lossless": True}, "lossless", "True", "left out for webp"),
    ({"generate_sound": True, "output": "wav", "lossless": True}, "lossless", "True", "left out for wav"),
    ({"lossless": 1}, "lossless", "1", "true or false"),
    ({"crf": 18, "lossless": True}, "crf", "18", "left out beside lossless"),
    ({"noise": [1]}, "noise", "list", "a mapping"),
    ({"noise": {"video": 5}}, "noise.video", "int", "a floating point tensor"),
    ({"noise": {"video": torch.full((1, 48, 3, 4, 4), float("nan"))}}, "noise.video", "NaN", "finite"),
    ({"noise": {"video": torch.zeros(1, 48, 1, 1, 1)}}, "noise.video", "[1, 48, 1, 1, 1]", "[1, 48, 3, 4, 4]"),
]


@pytest.mark.parametrize(
    ("fields", "field", "given", "allowed"),
    BAD_REQUESTS,
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_request_is_refused_before_anything_is_allocated(
    fields: dict[str, Any],
    field: str,
    given: str,
    allowed: str,
    tiny_nano: Path,
    engine_for: Callable[[Path], Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_for(tiny_nano)
    monkeypatch.setattr(engine.denoiser.transformer, "velocity", never_called)
    monkeypatch.setattr(engine.denoiser.transformer, "prefill", never_called)
    request = GenerationRequest(**{"prompt": "a car", "num_frames": 9, "height": 64, "width": 64, **fields})
    with LargestTensor() as largest, pytest.raises(RequestError) as caught:
        generate(engine, request, tmp_path / "clip")
    assert largest.num_bytes < 1 << 20
    error = caught.value
    assert error.field == field
    assert given in str(error)
    assert allowed in str(error)
    assert len(str(error)) < 500
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("asked", "run"), [(2, 5), (6, 9), (9, 9), (1200, 1201)])
def test_a_clip_length_that_cannot_be_is_rounded_up_and_said(
    asked: int, run: int, tiny_nano: Path, engine_for: Callable[[Path], Engine]
) -> None:
    resolved = resolve(
        GenerationRequest(prompt="a car", num_frames=asked, height=64, width=64), engine_for(tiny_nano).layout
    )
    assert resolved.num_frames == run
    assert [f"num_frames={asked} was rounded up to {run}" in note for note in resolved.notes] == [True] * (asked != run)


def break_json(path: Path) -> None:
    path.write_text("{")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shards(root: Path) -> list[Path]:
    return sorted((root / "transformer").glob("*.safetensors"))


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def pickle_instead(path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, path)


BAD_CHECKPOINTS: list[tuple[str, Callable[[Path], Any], type[Exception], str]] = [
    ("missing shard", lambda root: shards(root)[1].unlink(), MissingFileError, "00002-of-"),
    ("truncated shard", lambda root: truncate(shards(root)[1]), CorruptFileError, "truncated"),
    (
        "wrong shape",
        lambda root: edit_json(root / "transformer" / "config.json", intermediate_size=104),
        TensorMismatchError,
        "another shape",
    ),
    (
        "missing tensors",
        lambda root: edit_json(root / "transformer" / "config.json", num_hidden_layers=9),
        TensorMismatchError,
        "missing",
    ),
    ("no tokenizer", lambda root: shutil.rmtree(root / "text_tokenizer"), MissingFileError, "text_tokenizer"),
    (
        "no tokenizer.json",
        lambda root: (root / "text_tokenizer" / "tokenizer.json").unlink(),
        MissingFileError,
        "tokenizer.json",
    ),
    (
        "broken tokenizer",
        lambda root: break_json(root / "text_tokenizer" / "tokenizer.json"),
        CorruptFileError,
        "token",
    ),
    ("a pickle for safetensors", lambda root: pickle_instead(shards(root)[0]), CorruptFileError, "pickle"),
    (
        "a pickle for the vae",
        lambda root: pickle_instead(root / "vae" / "diffusion_pytorch_model.safetensors"),
        CorruptFileError,
        "pickle",
    ),
    ("no index", lambda root: (root / "model_index.json").unlink(), MissingFileError, "model_index.json"),
    ("broken config", lambda root: break_json(root / "vae" / "config.json"), CorruptFileError, "not valid JSON"),
    (
        "distilled",
        lambda root: edit_json(
            root / "scheduler" / "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"
        ),
        CapabilityError,
        "distilled",
    ),
]


@pytest.mark.parametrize(("what", "harm", "kind", "said"), BAD_CHECKPOINTS, ids=[entry[0] for entry in BAD_CHECKPOINTS])
def test_a_bad_checkpoint_is_refused_with_the_file_named(
    what: str, harm: Callable[[Path], Any], kind: type[Exception], said: str, tiny_nano: Path, tmp_path: Path
) -> None:
    root = tmp_path / "checkpoint"
    shutil.copytree(tiny_nano, root)
    harm(root)
    with pytest.raises(kind) as caught:
        Engine(root, device="cpu")
    assert type(caught.value) is kind
    assert said in str(caught.value)


@pytest.mark.parametrize("given", ["nvidia/Cosmos3-Nano", "/no/such/place"])
def test_a_hub_name_or_a_wrong_path_says_what_to_do(given: str) -> None:
    with pytest.raises(MissingFileError, match="`cosmos3 download OWNER/NAME` fetches"):
        Engine(given, device="cpu")


def test_the_engine_refuses_what_it_cannot_do(
    tiny_nano: Path, tiny_edge: Path, engine_for: Callable[[Path], Engine]
) -> None:
    with pytest.raises(CapabilityError, match="load_sound"):
        Engine(tiny_edge, load_sound=True)
    with pytest.raises(RequestError, match="device must be cpu"):
        Engine(tiny_nano, device="cuda:99" if not torch.cuda.is_available() else "no-such-device")
    ids = torch.tensor([[1, 2, 3]])
    ones = torch.ones_like(ids)
    good = Cosmos3T2VRequest(ids, ones, ids, ones, (1, 2, 2))
    engine = engine_for(tiny_nano)
    for changes, said in [
        ({"sound_frames": -1}, "num_sound_latents"),
        ({"text_mask": torch.ones(1, 2)}, "text_ids, text_mask"),
        ({"text_mask": torch.zeros(1, 3)}, "text_mask"),
        ({"text_mask": torch.tensor([[0, 1, 1]])}, "padding on the right"),
        ({"neg_text_ids": ids[0]}, "neg_text_ids"),
        ({"video_shape": (0, 2, 2)}, "video_shape"),
        ({"video_shape": (1, 2)}, "video_shape"),
        ({"video_shape": (1, 2, 2.5)}, "video_shape"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"fps": -1.0}, "fps"),
        ({"flow_shift": 0.0}, "flow_shift"),
        ({"seed": -1}, "seed"),
        ({"schedule": "cosine"}, "schedule"),
    ]:
        with pytest.raises(RequestError, match=said):
            engine.step(Cosmos3T2VRequest(**{**vars(good), **changes}))
    with pytest.raises(RequestError, match="output"):
        engine.step(good, output="video")  # type: ignore[arg-type]
    with Engine(tiny_nano, device="cpu", load_sound=False) as silent:
        with pytest.raises(CapabilityError, match="sound_frames must be None .got 5"):
            silent.step(Cosmos3T2VRequest(**{**vars(good), "sound_frames": 5}))
        with pytest.raises(CapabilityError, match="load_sound"):
            silent.decode_sound(torch.zeros(64, 2))
    with pytest.raises(CapabilityError, match="makes no sound"):
        engine_for(tiny_edge).denoise(Cosmos3T2VRequest(**{**vars(good), "sound_frames": 5}))


def test_a_closed_engine_refuses_requests(tiny_nano: Path) -> None:
    ids = torch.tensor([[1, 2, 3]])
    with Engine(tiny_nano, device="cpu") as engine:
        request = Cosmos3T2VRequest(ids, torch.ones_like(ids), ids, torch.ones_like(ids), (1, 2, 2))
    engine.close()
    with pytest.raises(ClosedError):
        engine.step(request)
    with pytest.raises(ClosedError):
        engine.decode(torch.zeros(1, 48, 1, 2, 2))
    with pytest.raises(ClosedError):
        engine.decode_sound(torch.zeros(64, 2))


def test_the_command_line_prints_one_line_and_exits_2(
    tiny_nano: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(tiny_nano), "--prompt", "a car", "--height", "100", "--out", str(tmp_path / "x")]
    assert main([*arguments, "--device", "cpu"]) == 2
    output = capsys.readouterr()
    assert output.err.strip().splitlines()[-1].startswith("error: height must be a multiple of 16 (got 100)")
    assert "Traceback" not in output.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("out", "said"), [("no/such/folder/clip", "existing directory")])
def test_a_place_that_cannot_be_written_is_refused(
    out: str, said: str, tiny_nano: Path, engine_for: Callable[[Path], Engine], tmp_path: Path
) -> None:
    request = GenerationRequest(prompt="a car", num_frames=1, height=32, width=32, num_inference_steps=1)
    with pytest.raises(RequestError, match=said):
        generate(engine_for(tiny_nano), request, tmp_path / out)
