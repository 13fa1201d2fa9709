"""Weight files: found, checked, and read by slices into the parameters of each rank."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cosmos3_core.checkpoint import reader
from cosmos3_core.checkpoint.reader import load_parameters
from cosmos3_core.checkpoint.tensors import ParameterPlan
from cosmos3_core.checkpoint.weight_files import WeightFiles, check_tensors
from cosmos3_core.errors import CapabilityError, CorruptFileError, MissingFileError, RequestError, TensorMismatchError
from cosmos3_core.parallel.sharding import Shard, Split

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_single(directory: Path, tensors: dict[str, Tensor], name: str = SINGLE) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / name, metadata={"format": "pt"})
    return directory / name


def write_shards(directory: Path, *shards: dict[str, Tensor]) -> list[Path]:
    """Shards and their index, as save_pretrained writes them."""
    paths = []
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        filename = f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
        paths.append(write_single(directory, tensors, filename))
        weight_map |= dict.fromkeys(tensors, filename)
    write_index(directory, weight_map)
    return paths


def write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def write_raw(directory: Path, header: object, data: bytes = b"", name: str = SINGLE) -> Path:
    """Write a file with this header, JSON text or an object, valid or not."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path = directory / name
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# --- finding files and reading headers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SINGLE, "model.safetensors"])
def test_a_single_file_is_found_under_both_names(tmp_path: Path, name: str) -> None:
    path = write_single(tmp_path, random_tensors({"norm.weight": (4,), "proj_in.weight": (4, 3)}), name)
    files = WeightFiles.open(tmp_path)
    entry = files.tensors["proj_in.weight"]
    assert set(files.tensors) == {"norm.weight", "proj_in.weight"}
    assert (entry.path, entry.shape, entry.dtype, entry.num_bytes) == (path, (4, 3), "BF16", 24)
    assert files.num_files == 1


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    first, second = write_shards(
        tmp_path, random_tensors({"norm.weight": (4,)}), random_tensors({"proj_in.bias": (2,)})
    )
    files = WeightFiles.open(tmp_path)
    assert {name: entry.path for name, entry in files.tensors.items()} == {"norm.weight": first, "proj_in.bias": second}
    assert files.num_files == 2


def test_the_stored_dtype_is_that_of_most_bytes(tmp_path: Path) -> None:
    few = random_tensors({"time_embedder.linear_1.bias": (4,)}, torch.float32)
    write_single(tmp_path, random_tensors({"norm.weight": (16,)}) | few)
    assert WeightFiles.open(tmp_path).dtype == "BF16"


def test_missing_weights_say_what_is_there_instead(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=rf"{SINGLE}: no such file.*there are no safetensors files"):
        WeightFiles.open(tmp_path)
    *_, path = write_shards(tmp_path, random_tensors({"norm.weight": (4,)}))
    (tmp_path / INDEX).unlink()
    with pytest.raises(MissingFileError, match=rf"the index included; there are {path.name}"):
        WeightFiles.open(tmp_path)


def test_missing_shards_are_named_and_counted(tmp_path: Path) -> None:
    shards = [random_tensors({name: (2,)}) for name in ("norm.weight", "proj_in.bias", "proj_out.bias")]
    paths = write_shards(tmp_path, *shards)
    paths[1].unlink()
    with pytest.raises(MissingFileError, match=rf"{paths[1].name}: .*{INDEX} lists it \(1 of 3 shards.*Download"):
        WeightFiles.open(tmp_path)


def test_a_link_to_a_blob_that_is_gone_counts_as_missing(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, random_tensors({"norm.weight": (4,)}))
    path.unlink()
    path.symlink_to(tmp_path / "blobs" / "0123")
    with pytest.raises(MissingFileError, match=path.name):
        WeightFiles.open(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 8, 9, 60, -1])
def test_truncation_is_found_from_the_header(tmp_path: Path, kept: int) -> None:
    path = write_single(tmp_path, random_tensors({"norm.weight": (4,), "proj_in.weight": (64, 3)}))
    os.truncate(path, kept if kept >= 0 else path.stat().st_size + kept)
    with pytest.raises(CorruptFileError, match=rf"{SINGLE}: truncated: .*Download the file again"):
        WeightFiles.open(tmp_path)


def test_truncation_names_the_shard_and_the_tensor(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, random_tensors({"norm.weight": (4,)}), random_tensors({"proj_in.weight": (64, 3)}))
    os.truncate(paths[1], paths[1].stat().st_size - 100)
    with pytest.raises(CorruptFileError, match=rf"{paths[1].name}: truncated: proj_in.weight ends at byte"):
        WeightFiles.open(tmp_path)


class _Trap:
    """Unpickling an instance makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "weights.pth", SINGLE])
def test_a_pickle_is_refused_and_never_run(tmp_path: Path, name: str, protocol: int) -> None:
    trap = tmp_path / "trapped"
    (tmp_path / name).write_bytes(pickle.dumps(_Trap(trap), protocol=protocol))
    with pytest.raises(CorruptFileError, match=rf"{name}: .*pickle.*never opened"):
        WeightFiles.open(tmp_path)
    assert not trap.exists()


def test_torchs_zip_is_refused(tmp_path: Path) -> None:
    torch.save({"norm.weight": torch.ones(4)}, tmp_path / SINGLE)
    with pytest.raises(CorruptFileError, match=rf"{SINGLE}: .*pickle under a safetensors name"):
        WeightFiles.open(tmp_path)


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path: Path) -> None:
    write_single(tmp_path, random_tensors({"norm.weight": (4,)}))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert set(WeightFiles.open(tmp_path).tensors) == {"norm.weight"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git-lfs pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "not a safetensors file"),
        (struct.pack("<Q", 2**40) + b"{}", "not a safetensors file"),
    ],
)
def test_other_content_is_told_apart(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(CorruptFileError, match=rf"{SINGLE}: .*{problem}"):
        WeightFiles.open(tmp_path)


def _line(begin: int, end: int, shape: tuple[int, ...] = (2,), dtype: str = "BF16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "num_data_bytes", "problem"),
    [
        ("{broken", 0, "header is not valid JSON"),
        ('{"a":' * 100_000, 0, "header is not valid JSON"),
        ('{"a": {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}, "a": {}}', 0, "a name appears twice"),
        ({"a": [1, 2]}, 0, "header's line for a is damaged"),
        ({"a": {"dtype": "BF16", "shape": [2]}}, 4, "header's line for a is damaged"),
        ({"a": _line(0, 4, shape=(-2,))}, 4, "header's line for a is damaged"),
        ({"a": _line(4, 0)}, 4, "header's line for a is damaged"),
        ({"a": _line(0, 4, dtype="Q7")}, 4, "a has the unknown element type 'Q7'"),
        ({"a": _line(0, 4, shape=(3,))}, 4, r"a is BF16 \[3\], which does not fit its 4 bytes"),
        ({"a": _line(0, 4), "b": _line(2, 6)}, 6, "b does not begin where the tensor before it ends"),
        ({"a": _line(0, 4), "b": _line(8, 12)}, 12, "b does not begin where the tensor before it ends"),
        ({"a": _line(0, 4)}, 7, "has 3 bytes that its header does not name"),
    ],
)
def test_a_damaged_header_is_named(tmp_path: Path, header: object, num_data_bytes: int, problem: str) -> None:
    write_raw(tmp_path, header, bytes(num_data_bytes))
    with pytest.raises(CorruptFileError, match=rf"{SINGLE}: .*{problem}"):
        WeightFiles.open(tmp_path)


def test_empty_and_scalar_tensors_are_sound(tmp_path: Path) -> None:
    tensors = {"empty": torch.empty(0, 4), "norm.weight": torch.ones(3), "scalar": torch.tensor(1.0)}
    write_single(tmp_path, tensors)
    shapes = {name: entry.shape for name, entry in WeightFiles.open(tmp_path).tensors.items()}
    assert shapes == {"empty": (0, 4), "norm.weight": (3,), "scalar": ()}


def test_index_and_shard_must_list_the_same_tensors(tmp_path: Path) -> None:
    (path,) = write_shards(tmp_path, random_tensors({"norm.weight": (4,)}))
    write_index(tmp_path, {"norm.weight": path.name, "proj_in.bias": path.name})
    with pytest.raises(TensorMismatchError, match=rf"{path.name}: lacks tensors that {INDEX} says.*: proj_in.bias"):
        WeightFiles.open(tmp_path)
    write_single(tmp_path, random_tensors({"norm.weight": (4,), "proj_in.bias": (2,), "stray": (2,)}), path.name)
    with pytest.raises(TensorMismatchError, match=rf"{path.name}: holds tensors that {INDEX} does not list.*: stray"):
        WeightFiles.open(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, {"norm.weight": "../other.safetensors"}, {"norm.weight": 3}])
def test_an_index_points_at_files_beside_it_only(tmp_path: Path, weight_map: object) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(CorruptFileError, match=rf"{INDEX}: .*weight_map"):
        WeightFiles.open(tmp_path)


def test_a_broken_index_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(CorruptFileError, match=rf"{INDEX}: not valid JSON"):
        WeightFiles.open(tmp_path)


# --- names -----------------------------------------------------------------------------------------------------------


def test_files_list_published_names_and_say_which_alias_was_stored(tmp_path: Path) -> None:
    write_single(tmp_path, random_tensors({"model.vae2llm.weight": (4, 3)}))
    files = WeightFiles.open(tmp_path)
    assert list(files.tensors) == ["proj_in.weight"]
    with pytest.raises(TensorMismatchError, match=r"proj_in\.weight \(stored as model\.vae2llm\.weight\) \[4, 3\]"):
        check_tensors(files, {"proj_in.weight": (4, 4)})


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    first, second = write_shards(
        tmp_path, random_tensors({"proj_in.weight": (4, 3)}), random_tensors({"vae2llm.weight": (4, 3)})
    )
    with pytest.raises(
        TensorMismatchError,
        match=rf"occurs twice: as proj_in.weight in {first.name} and as vae2llm.weight in {second.name}",
    ):
        WeightFiles.open(tmp_path)


def test_tensors_that_no_model_reads_are_dropped_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_single(tmp_path, random_tensors({"norm.weight": (4,), "model.action_pos_embed.weight": (2, 4)}))
    with caplog.at_level(logging.INFO):
        files = WeightFiles.open(tmp_path)
    assert list(files.tensors) == ["norm.weight"]
    assert "model.action_pos_embed.weight" in caplog.text


# --- check_tensors ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two_tensors(tmp_path: Path) -> WeightFiles:
    write_single(tmp_path, random_tensors({"norm.weight": (4,), "encoder.conv.weight": (4, 3)}))
    return WeightFiles.open(tmp_path)


def test_the_expected_tensors_pass(two_tensors: WeightFiles) -> None:
    check_tensors(two_tensors, {"norm.weight": (4,), "encoder.conv.weight": (4, 3)})


def test_all_kinds_of_mismatch_are_listed_at_once(two_tensors: WeightFiles) -> None:
    with pytest.raises(TensorMismatchError) as caught:
        check_tensors(two_tensors, {"norm.weight": (5,), "proj_in.bias": (7,)})
    for part in (
        str(two_tensors.directory),
        "1 missing: proj_in.bias [7]",
        f"1 unexpected: encoder.conv.weight [4, 3] in {SINGLE}",
        f"1 of another shape: norm.weight [4] in {SINGLE}, not [5]",
        "Check that config.json",
    ):
        assert part in str(caught.value)


def test_long_lists_are_cut_and_counted(two_tensors: WeightFiles) -> None:
    expected = {f"layers.{index}.norm": (1,) for index in range(20)}
    with pytest.raises(
        TensorMismatchError, match=r"20 missing: .*layers\.7\.norm \[1\] and 12 more\. 2 unex"
    ) as caught:
        check_tensors(two_tensors, expected)
    assert "layers.8.norm" not in str(caught.value)


def test_optional_tensors_may_be_absent_or_extra_but_not_of_another_shape(two_tensors: WeightFiles) -> None:
    expected = {"norm.weight": (4,)}
    check_tensors(two_tensors, expected, optional=["encoder.*"])
    check_tensors(
        two_tensors, expected | {"lm_head.weight": (9, 9)}, optional=["encoder.conv.weight", "lm_head.weight"]
    )
    with pytest.raises(TensorMismatchError, match="1 of another shape: encoder.conv.weight"):
        check_tensors(two_tensors, expected | {"encoder.conv.weight": (4, 4)}, optional=["encoder.*"])


def test_fp8_weights_are_refused(tmp_path: Path) -> None:
    path = write_single(tmp_path, {"norm.weight": torch.ones(4).to(torch.float8_e4m3fn)})
    files = WeightFiles.open(tmp_path)
    plans = [ParameterPlan("weight", ("norm.weight",))]
    match = rf"norm.weight \[4\] in {SINGLE} is F8_E4M3.*{path}"
    with pytest.raises(CapabilityError, match=match):
        check_tensors(files, {"norm.weight": (4,)})
    with pytest.raises(CapabilityError, match=match):
        load_parameters(meta_norm(4), files, plans, device="cpu", dtype=torch.bfloat16)
    with pytest.raises(CapabilityError, match=match):
        _ = files.dtype


# --- load_parameters -------------------------------------------------------------------------------------------------

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 12, 8, 4, 4, 16
LAYER = "layers.0"
PUBLISHED = {
    f"{LAYER}.input_layernorm.weight": (HIDDEN,),
    f"{LAYER}.self_attn.to_q.weight": (HEADS * HEAD_DIM, HIDDEN),
    f"{LAYER}.self_attn.to_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    f"{LAYER}.self_attn.to_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    f"{LAYER}.self_attn.to_q.bias": (HEADS * HEAD_DIM,),
    f"{LAYER}.self_attn.to_k.bias": (KV_HEADS * HEAD_DIM,),
    f"{LAYER}.self_attn.to_v.bias": (KV_HEADS * HEAD_DIM,),
    f"{LAYER}.self_attn.to_out.weight": (HIDDEN, HEADS * HEAD_DIM),
    f"{LAYER}.self_attn.to_out.bias": (HIDDEN,),
    f"{LAYER}.mlp.gate_proj.weight": (FFN, HIDDEN),
    f"{LAYER}.mlp.up_proj.weight": (FFN, HIDDEN),
    f"{LAYER}.mlp.down_proj.weight": (HIDDEN, FFN),
    "time_embedder.linear_1.weight": (HIDDEN, 6),
}
QKV = tuple(f"{LAYER}.self_attn.to_{name}" for name in "qkv")
PLANS = [
    ParameterPlan("norm", (f"{LAYER}.input_layernorm.weight",)),
    ParameterPlan("qkv.weight", tuple(f"{name}.weight" for name in QKV)),
    ParameterPlan("qkv.bias", tuple(f"{name}.bias" for name in QKV)),
    ParameterPlan("out.weight", (f"{LAYER}.self_attn.to_out.weight",)),
    ParameterPlan("out.bias", (f"{LAYER}.self_attn.to_out.bias",)),
    ParameterPlan("mlp.up.weight", (f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight")),
    ParameterPlan("mlp.down.weight", (f"{LAYER}.mlp.down_proj.weight",)),
    ParameterPlan("time.weight", ("time_embedder.linear_1.weight",), is_fp32=True),
]


class Layer(nn.Module):
    """A layer with every kind of split: fused column, row, bias of both, replicated; built with local sizes."""

    def __init__(self, tp: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.empty(HIDDEN))
        self.qkv = nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM // tp)
        self.out = nn.Linear(HEADS * HEAD_DIM // tp, HIDDEN)
        self.mlp = nn.ModuleDict(
            {"up": nn.Linear(HIDDEN, 2 * FFN // tp, bias=False), "down": nn.Linear(FFN // tp, HIDDEN, bias=False)}
        )
        self.time = nn.Linear(6, HIDDEN, bias=False)


def meta_layer(tp: int = 1) -> Layer:
    with torch.device("meta"):
        return Layer(tp)


def meta_norm(width: int) -> nn.Module:
    with torch.device("meta"):
        return nn.LayerNorm(width, bias=False)


def load_layer(files: WeightFiles, dtype: torch.dtype, rank: int = 0, tp: int = 1) -> Layer:
    layer = meta_layer(tp)
    load_parameters(layer, files, PLANS, device="cpu", dtype=dtype, shard=Shard(rank, tp))
    return layer


@pytest.fixture
def stored() -> dict[str, Tensor]:
    return random_tensors(PUBLISHED)


@pytest.fixture
def files(tmp_path: Path, stored: dict[str, Tensor]) -> WeightFiles:
    """The layer's tensors over two shards, so that fused parameters come from both."""
    names = list(stored)
    write_shards(tmp_path, {name: stored[name] for name in names[::2]}, {name: stored[name] for name in names[1::2]})
    return WeightFiles.open(tmp_path)


@pytest.mark.parametrize("staging_bytes", [reader._StagedReader.STAGING_BYTES, 100, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_ranks_parts_make_up_the_whole(
    files: WeightFiles,
    stored: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    tp: int,
    dtype: torch.dtype,
    staging_bytes: int,
) -> None:
    monkeypatch.setattr(reader._StagedReader, "STAGING_BYTES", staging_bytes)  # small: pieces end inside each tensor
    ranks = [load_layer(files, dtype, rank, tp) for rank in range(tp)]

    def assert_whole(name: str, parts: list[Tensor], axis: int) -> None:
        torch.testing.assert_close(torch.cat(parts, axis), stored[name].to(dtype), rtol=0, atol=0)

    qkv_rows = [HEADS * HEAD_DIM // tp, KV_HEADS * HEAD_DIM // tp, KV_HEADS * HEAD_DIM // tp]
    for kind in ("weight", "bias"):
        fused = [getattr(rank.qkv, kind).split(qkv_rows) for rank in ranks]
        for index, name in enumerate(QKV):
            assert_whole(f"{name}.{kind}", [parts[index] for parts in fused], 0)
    gate_up = [rank.mlp["up"].weight.chunk(2) for rank in ranks]
    assert_whole(f"{LAYER}.mlp.gate_proj.weight", [parts[0] for parts in gate_up], 0)
    assert_whole(f"{LAYER}.mlp.up_proj.weight", [parts[1] for parts in gate_up], 0)
    assert_whole(f"{LAYER}.self_attn.to_out.weight", [rank.out.weight for rank in ranks], 1)
    assert_whole(f"{LAYER}.mlp.down_proj.weight", [rank.mlp["down"].weight for rank in ranks], 1)
    for rank in ranks:
        assert_whole(f"{LAYER}.input_layernorm.weight", [rank.norm], 0)
        assert_whole(f"{LAYER}.self_attn.to_out.bias", [rank.out.bias], 0)


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.float16])
def test_every_floating_type_converts(tmp_path: Path, source: torch.dtype) -> None:
    tensors = random_tensors(PUBLISHED, source)
    write_single(tmp_path, tensors)
    layer = load_layer(WeightFiles.open(tmp_path), torch.bfloat16)
    assert torch.equal(layer.out.weight, tensors[f"{LAYER}.self_attn.to_out.weight"].to(torch.bfloat16))


def test_parameters_have_the_types_asked_for_and_no_gradient(files: WeightFiles, stored: dict[str, Tensor]) -> None:
    layer = load_layer(files, torch.bfloat16)
    types = {name: parameter.dtype for name, parameter in layer.named_parameters()}
    assert types.pop("time.weight") is torch.float32
    assert set(types.values()) == {torch.bfloat16}
    assert torch.equal(layer.time.weight, stored["time_embedder.linear_1.weight"].float())
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in layer.parameters())
    assert all(parameter.is_contiguous() for parameter in layer.parameters())


def test_tensors_of_more_axes_are_cut_alike(tmp_path: Path) -> None:
    kernel = torch.randn(4, 6, 3, 2)
    write_single(tmp_path, {"conv.weight": kernel})
    files = WeightFiles.open(tmp_path)
    for split, expected in ((Split.COLUMN, kernel[2:]), (Split.ROW, kernel[:, 3:]), (Split.REPLICATE, kernel)):
        with torch.device("meta"):
            conv = nn.Module()
            conv.weight = nn.Parameter(torch.empty(expected.shape))
        plans = [ParameterPlan("weight", ("conv.weight",))]
        load_parameters(
            conv, files, plans, device="cpu", dtype=torch.float32, shard=Shard(1, 2), split=lambda _, kind=split: kind
        )
        assert torch.equal(conv.weight, expected)


def test_aliased_tensors_are_read_and_split_by_their_published_names(tmp_path: Path, stored: dict[str, Tensor]) -> None:
    trained = {
        "model." + re.sub(r"to_([qkv])\.", r"\1_proj.", name).replace("to_out", "o_proj"): tensor
        for name, tensor in stored.items()
    }
    write_single(tmp_path, trained)
    files = WeightFiles.open(tmp_path)
    check_tensors(files, PUBLISHED)
    layer = load_layer(files, torch.bfloat16, rank=1, tp=2)
    assert torch.equal(layer.out.weight, stored[f"{LAYER}.self_attn.to_out.weight"][:, HEADS * HEAD_DIM // 2 :])


def assert_untouched(module: nn.Module) -> None:
    """Bad input is found before anything is allocated."""
    assert all(parameter.is_meta for parameter in module.parameters())


def test_a_parameter_without_plan_is_named(files: WeightFiles) -> None:
    layer = meta_layer()
    with pytest.raises(TensorMismatchError, match="1 module parameters without a plan: norm"):
        load_parameters(layer, files, PLANS[1:], device="cpu", dtype=torch.bfloat16)
    assert_untouched(layer)


def test_a_plan_without_parameter_is_named(files: WeightFiles) -> None:
    extra = ParameterPlan("gate.weight", ("time_embedder.linear_1.weight",))
    with pytest.raises(TensorMismatchError, match="1 plans for parameters that the module lacks: gate.weight"):
        load_parameters(meta_layer(), files, [*PLANS, extra], device="cpu", dtype=torch.bfloat16)


def test_two_plans_for_one_parameter_are_refused(files: WeightFiles) -> None:
    with pytest.raises(TensorMismatchError, match="1 parameters with several plans: norm"):
        load_parameters(meta_layer(), files, [*PLANS, PLANS[0]], device="cpu", dtype=torch.bfloat16)


def test_a_missing_source_is_named(tmp_path: Path, stored: dict[str, Tensor]) -> None:
    del stored[f"{LAYER}.mlp.up_proj.weight"]
    write_single(tmp_path, stored)
    layer = meta_layer()
    with pytest.raises(TensorMismatchError, match=r"1 tensors are missing: layers\.0\.mlp\.up_proj\.weight"):
        load_parameters(layer, WeightFiles.open(tmp_path), PLANS, device="cpu", dtype=torch.bfloat16)
    assert_untouched(layer)


def test_a_part_of_another_shape_is_named_with_both_shapes(files: WeightFiles) -> None:
    layer = meta_layer(tp=1)
    with pytest.raises(
        TensorMismatchError,
        match=r"qkv\.weight of rank 1 of 2 is \[64, 12\], but its part of .*to_k\.weight \[16, 12\].* is \[32, 12\]",
    ):
        load_parameters(layer, files, PLANS, device="cpu", dtype=torch.bfloat16, shard=Shard(1, 2))
    assert_untouched(layer)


def test_parts_that_do_not_stack_are_named(tmp_path: Path, stored: dict[str, Tensor]) -> None:
    stored[f"{LAYER}.mlp.up_proj.weight"] = torch.ones(FFN, HIDDEN + 1)
    write_single(tmp_path, stored)
    with pytest.raises(TensorMismatchError, match=r"mlp\.up\.weight .* is unstackable"):
        load_layer(WeightFiles.open(tmp_path), torch.bfloat16)


@pytest.mark.parametrize(
    ("value", "problem"), [(torch.ones(HIDDEN, dtype=torch.int64), "is I64"), (torch.tensor(1.0), "is a scalar")]
)
def test_what_cannot_be_a_parameter_is_named(
    tmp_path: Path, stored: dict[str, Tensor], value: Tensor, problem: str
) -> None:
    name = f"{LAYER}.input_layernorm.weight"
    write_single(tmp_path, stored | {name: value})
    layer = meta_layer()
    with pytest.raises(TensorMismatchError, match=rf"{SINGLE}: {name} {problem}"):
        load_parameters(layer, WeightFiles.open(tmp_path), PLANS, device="cpu", dtype=torch.bfloat16)
    assert_untouched(layer)


def test_a_tensor_that_does_not_divide_is_named(files: WeightFiles) -> None:
    layer = meta_layer()
    with pytest.raises(RequestError, match=r"tp must be a divisor of .*layers\.0\.self_attn\.to_q\.weight"):
        load_parameters(layer, files, PLANS, device="cpu", dtype=torch.bfloat16, shard=Shard(0, 3))
    assert_untouched(layer)


def test_a_file_that_shrank_since_it_was_opened_is_named(files: WeightFiles) -> None:
    path = files.tensors["time_embedder.linear_1.weight"].path
    os.truncate(path, 900)
    with pytest.raises(CorruptFileError, match=rf"{path.name}: shrank to 900 bytes .* lacks part of layers"):
        load_layer(files, torch.bfloat16)


def test_a_file_that_vanished_since_it_was_opened_is_named(files: WeightFiles) -> None:
    path = files.tensors["time_embedder.linear_1.weight"].path
    path.unlink()
    with pytest.raises(CorruptFileError, match=rf"{path.name}: .*cannot be read \(No such file or directory\)"):
        load_layer(files, torch.bfloat16)
