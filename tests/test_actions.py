"""Actions between the robot's numbers and the model's: statistics, given rows, results."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cosmos3_core.actions import ActionStatistics, ActionTrack, GeneratedActions, action_rows, convert_actions
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.engine import Engine
from cosmos3_core.errors import CorruptFileError, RequestError
from cosmos3_core.generate import generate
from cosmos3_core.presets import PRESETS
from cosmos3_core.request import GenerationRequest
from cosmos3_core.resolve import resolve
from tests.mode_inputs import MINIMAL

AV = {"q01": [float(-number) for number in range(1, 10)], "q99": [3.0 * number for number in range(1, 10)]}
"""Of an embodiment of 9 numbers: the middle is 1 to 9, half the range is 2 to 18."""

FIXED = np.arange(1, 10, dtype=np.float32)


def write_statistics(checkpoint: Path, content: Any, name: str = "av") -> Path:
    folder = checkpoint / "assets" / "action_stats"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize(
    ("content", "offset", "scale"),
    [
        ({"q01": [-1.0, 2.0], "q99": [3.0, 2.0]}, [1.0, 2.0], [2.0, 0.5e-8]),
        ({"min": [-2, 0], "max": [2, 8]}, [0.0, 4.0], [2.0, 4.0]),
        ({"mean": [1.0, 2.0], "std": [0.5, 0.0]}, [1.0, 2.0], [0.5, 1e-8]),
        ({"mean": [9, 9], "std": [9, 9], "min": [-2, 0], "max": [2, 8]}, [0.0, 4.0], [2.0, 4.0]),
        ({"min": [9, 9], "max": [9, 9], "q01": [-1, 0], "q99": [3, 2]}, [1.0, 1.0], [2.0, 1.0]),
        ({"q01": [9, 9], "mean": [1, 1], "std": [2, 4]}, [1.0, 1.0], [2.0, 4.0]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_the_first_pair_of_keys_counts(
    content: dict[str, Any], offset: list[float], scale: list[float], is_nested: bool, tmp_path: Path
) -> None:
    write_statistics(tmp_path, {"global": content, "by_joint": 1} if is_nested else {**content, "unit": "m"})
    statistics = ActionStatistics.of(tmp_path, "av", 2)
    assert statistics is not None
    assert statistics.offset.tolist() == pytest.approx(offset)
    assert statistics.scale.tolist() == pytest.approx(scale)
    actions = np.array([[0.25, 2.0], [-7.0, 2.0]], np.float32)
    normalised = statistics.normalise(actions)
    assert normalised[:, 0].tolist() == pytest.approx([(0.25 - offset[0]) / scale[0], (-7 - offset[0]) / scale[0]])
    assert statistics.restore(normalised) == pytest.approx(actions)
    assert normalised.dtype == statistics.restore(normalised).dtype == np.float32


def test_without_a_file_there_are_none(tmp_path: Path) -> None:
    write_statistics(tmp_path, AV)
    assert ActionStatistics.of(tmp_path, "umi", 10) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ("[1, 2]", "object"),
        ({}, "has none of q01 and q99"),
        ({"q01": [0, 0]}, "has none of q01 and q99"),
        ({"global": {}}, "has none of q01 and q99"),
        ({"q01": [0, 0], "q99": [1]}, "q99 is not a list of 2 finite numbers"),
        ({"q01": [0, 0, 0], "q99": [1, 1, 1]}, "q01 is not a list of 2"),
        ({"q01": [[0, 0]], "q99": [1, 1]}, "q01 is not a list of 2"),
        ({"q01": [[0], 0], "q99": [1, 1]}, "q01 is not a list of 2"),
        ({"q01": ["a", "b"], "q99": [1, 1]}, "q01 is not a list of 2"),
        ({"q01": None, "q99": [1, 1]}, "q01 is not a list of 2"),
        ({"q01": {"x": 1}, "q99": [1, 1]}, "q01 is not a list of 2"),
        ({"q01": [float("nan"), 0], "q99": [1, 1]}, "q01 is not a list of 2 finite"),
        ({"q01": [1e300, 0], "q99": [1, 1]}, "q01 is not a list of 2 finite"),
        ({"q01": [10**400, 0], "q99": [1, 1]}, "q01 is not a list of 2 finite"),
        ({"mean": [0, 0], "std": 1.0}, "std is not a list of 2"),
    ],
    ids=str,
)
def test_a_broken_file_is_named(content: Any, said: str, tmp_path: Path) -> None:
    path = write_statistics(tmp_path, content)
    with pytest.raises(CorruptFileError, match=said) as caught:
        ActionStatistics.of(tmp_path, "av", 2)
    assert caught.value.path == str(path)


def test_given_rows_are_repeated_or_cut() -> None:
    rows = [[1.0, 2.0], [3.0, 4.0]]
    assert convert_actions("actions", rows, 2, 2, None) == ((1, 2), (3, 4))
    assert convert_actions("actions", np.array(rows), 2, 4, None) == ((1, 2), (3, 4), (3, 4), (3, 4))
    assert convert_actions("actions", rows, None, 1, None) == ((1, 2),)
    statistics = ActionStatistics(np.array([1, 0], np.float32), np.array([2, 4], np.float32))
    assert convert_actions("actions", rows, 2, 3, statistics) == ((0, 0.5), (1, 1), (1, 1))


@pytest.mark.parametrize(
    ("values", "width", "said"),
    [
        ("jump", 2, "1 to 1200 rows of 2 numbers"),
        ([], 2, "shape [0]"),
        ([[]], 2, "shape [1, 0]"),
        ([1.0, 2.0], 2, "shape [2]"),
        ([[1.0, 2.0], [3.0]], 2, "rows of 2 numbers"),
        ([[1.0, 2.0, 3.0]], 2, "rows of 3 numbers"),
        ([["a", "b"]], 2, "rows of 2 numbers"),
        ([[None, 1.0]], 2, "a value out of range"),
        ([[float("nan"), 1.0]], 2, "a value out of range"),
        ([[float("-inf"), 1.0]], 2, "a value out of range"),
        ([[1e7, 1.0]], 2, "within 1e+06"),
        ([[1e300, 1.0]], 2, "within 1e+06"),
        ([[10**400, 1.0]], 2, "rows of 2 numbers"),
        ([[0.0, 1.0]] * 1201, 2, "shape [1201, 2]"),
        ({"data": [[1.0]]}, None, "rows of numbers"),
        ([[[1.0]]], None, "shape [1, 1, 1]"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_rows_that_are_none_are_refused(values: Any, width: int | None, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        action_rows("actions", values, width)
    assert caught.value.field == "actions"
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_result_says_in_which_space_it_is() -> None:
    values = np.array([[0.5, -1.0]], np.float32)
    track = ActionTrack(1, "pusht", 4, 2, "ego_view", None)
    plain = track.restore(values)
    assert plain.is_normalised
    assert plain.as_json() == {
        "data": [[0.5, -1.0]],
        "shape": [1, 2],
        "dtype": "float32",
        "raw_action_dim": 2,
        "domain_id": 4,
        "domain_name": "pusht",
        "is_normalised": True,
    }
    statistics = ActionStatistics(np.array([1, 0], np.float32), np.array([2, 4], np.float32))
    restored = replace(track, statistics=statistics).restore(values)
    assert not restored.is_normalised
    assert restored.as_json()["data"] == [[2.0, -4.0]]
    assert json.loads(json.dumps(restored.as_json()))["is_normalised"] is False


@pytest.fixture(scope="module")
def with_statistics(tiny_nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("statistics") / "nano"
    shutil.copytree(tiny_nano, root)
    write_statistics(root, AV)
    return root


def test_given_actions_are_normalised_where_the_checkpoint_knows_how(with_statistics: Path, tiny_nano: Path) -> None:
    actions = np.stack([FIXED, 3 * FIXED])

    def find_given(checkpoint: Path, **fields: Any) -> Any:
        request = GenerationRequest(**{**MINIMAL["forward_dynamics"], "actions": actions, **fields})
        track = resolve(request, CheckpointLayout.open(checkpoint)).action
        assert track is not None
        return np.array(track.given, np.float32)

    assert find_given(with_statistics) == pytest.approx(np.array([[0.0] * 9, [1.0] * 9]))
    assert find_given(tiny_nano) == pytest.approx(actions)
    assert find_given(with_statistics, compat="diffusers") == pytest.approx(actions)
    assert find_given(with_statistics, domain_name="camera_pose") == pytest.approx(actions), "statistics of another one"


def test_generated_actions_are_brought_back(with_statistics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(PRESETS["nano", "policy"], num_inference_steps=2)
    monkeypatch.setitem(PRESETS, ("nano", "policy"), row)
    request = GenerationRequest(**MINIMAL["policy"], action_chunk_size=4)
    with Engine(with_statistics, device="cpu", dtype=torch.float32) as engine:
        results = {}
        for compat in ("native", "diffusers"):
            result = generate(engine, replace(request, compat=compat), output="latent")
            assert result.actions is not None
            assert result.latents is not None
            results[compat] = result.actions, result.latents["action"][:, :9].numpy()
    actions, latents = results["native"]
    assert isinstance(actions, GeneratedActions)
    assert not actions.is_normalised
    assert actions.values == pytest.approx(latents * (2 * FIXED) + FIXED, rel=1e-5, abs=1e-5)
    actions, latents = results["diffusers"]
    assert actions.is_normalised
    assert np.array_equal(actions.values, latents)


def test_broken_statistics_are_found_before_the_run(with_statistics: Path, tmp_path: Path) -> None:
    root = tmp_path / "nano"
    shutil.copytree(with_statistics, root)
    write_statistics(root, {"q01": [0.0], "q99": [1.0]})
    with pytest.raises(CorruptFileError, match="av.json.*list of 9"):
        resolve(GenerationRequest(**MINIMAL["policy"]), CheckpointLayout.open(root))
    with pytest.raises(CorruptFileError, match="av.json.*list of 9"):
        resolve(GenerationRequest(**MINIMAL["forward_dynamics"]), CheckpointLayout.open(root))
