"""The split table against the published tensors, and local configs against the table."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.checkpoint.tensors import transformer_tensors
from cosmos3_core.errors import RequestError
from cosmos3_core.parallel.sharding import WHOLE_MODEL, Shard, Split, list_tp_sizes, local_config, split_of

NANO = TransformerConfig(action_gen=True, sound_gen=True)
SUPER = dataclasses.replace(NANO, hidden_size=5120, num_attention_heads=64, intermediate_size=25600)
EDGE = TransformerConfig(
    hidden_size=2048, num_attention_heads=16, intermediate_size=9216, hidden_act="relu2", qk_norm_for_text=False
)
BIASED = dataclasses.replace(NANO, attention_bias=True)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("layers.0.self_attn.to_q.weight", Split.COLUMN),
        ("layers.63.self_attn.to_k.weight", Split.COLUMN),
        ("layers.0.self_attn.to_v.bias", Split.COLUMN),
        ("layers.0.self_attn.add_q_proj.weight", Split.COLUMN),
        ("layers.0.self_attn.add_k_proj.weight", Split.COLUMN),
        ("layers.0.self_attn.add_v_proj.bias", Split.COLUMN),
        ("layers.0.mlp.gate_proj.weight", Split.COLUMN),
        ("layers.0.mlp_moe_gen.up_proj.weight", Split.COLUMN),
        ("layers.0.self_attn.to_out.weight", Split.ROW),
        ("layers.0.self_attn.to_out.bias", Split.REPLICATE),
        ("layers.0.self_attn.to_add_out.weight", Split.ROW),
        ("layers.0.self_attn.to_add_out.bias", Split.REPLICATE),
        ("layers.0.mlp.down_proj.weight", Split.ROW),
        ("layers.0.mlp_moe_gen.down_proj.weight", Split.ROW),
        ("layers.0.self_attn.norm_q.weight", Split.REPLICATE),
        ("layers.0.input_layernorm.weight", Split.REPLICATE),
        ("embed_tokens.weight", Split.REPLICATE),
        ("proj_in.weight", Split.REPLICATE),
        ("time_embedder.linear_1.weight", Split.REPLICATE),
        ("action_proj_in.fc.weight", Split.REPLICATE),
        ("decoder.mid_block.attentions.0.to_qkv.weight", Split.REPLICATE),
    ],
)
def test_each_kind_of_tensor_is_split_as_its_layer_needs(name: str, split: Split) -> None:
    assert split_of(name) is split


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("config", [NANO, SUPER, EDGE, BIASED], ids=["nano", "super", "edge", "biased"])
def test_the_cut_tensors_are_those_of_the_local_config(config: TransformerConfig, tp: int) -> None:
    config = dataclasses.replace(config, num_hidden_layers=2)

    def cut(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis = {Split.COLUMN: 0, Split.ROW: 1, Split.REPLICATE: None}[split_of(name)]
        if axis is None:
            return shape
        part = Shard(tp - 1, tp).slice(shape[axis], name)
        return (*shape[:axis], part.stop - part.start, *shape[axis + 1 :])

    cut_shapes = {name: cut(name, shape) for name, shape in transformer_tensors(config).items()}
    assert cut_shapes == transformer_tensors(local_config(config, tp))


def test_shards_cover_everything_once_and_in_order() -> None:
    rows = list(range(12))
    shares = [rows[Shard(rank, 4).slice(12)] for rank in range(4)]
    assert shares == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert WHOLE_MODEL.slice(7) == slice(0, 7)


def test_an_indivisible_tensor_is_named() -> None:
    with pytest.raises(RequestError, match=r"tp must be a divisor of 6, .*layers\.3\.self_attn\.to_q\.weight .*got 4"):
        Shard(0, 4).slice(6, "layers.3.self_attn.to_q.weight")


@pytest.mark.parametrize(("rank", "size", "field"), [(2, 2, "rank"), (-1, 2, "rank"), (0, 0, "tp")])
def test_a_shard_is_one_of_its_ranks(rank: int, size: int, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        Shard(rank, size)
    assert caught.value.field == field


def test_a_local_config_divides_heads_and_columns_only() -> None:
    local = local_config(SUPER, 4)
    assert (local.num_attention_heads, local.num_key_value_heads, local.intermediate_size) == (16, 2, 6400)
    restored = dataclasses.replace(local, num_attention_heads=64, num_key_value_heads=8, intermediate_size=25600)
    assert restored == SUPER


@pytest.mark.parametrize("tp", [0, -1, 3, 16])
def test_an_impossible_tp_lists_the_possible_ones(tp: int) -> None:
    with pytest.raises(RequestError, match=r"one of 1, 2, 4, 8 for this checkpoint .*8 key-value heads") as caught:
        local_config(NANO, tp)
    assert (caught.value.field, caught.value.given) == ("tp", str(tp))


def test_every_divided_number_limits_tp() -> None:
    assert list_tp_sizes(dataclasses.replace(NANO, num_key_value_heads=6, num_attention_heads=24)) == (1, 2, 3, 6)
    assert list_tp_sizes(dataclasses.replace(NANO, num_attention_heads=12, num_key_value_heads=4)) == (1, 2, 4)
    assert list_tp_sizes(dataclasses.replace(NANO, intermediate_size=12290)) == (1, 2)


def test_no_torch_is_needed() -> None:
    code = "import sys, cosmos3_core.parallel.sharding; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
