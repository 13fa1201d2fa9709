"""Names, domain ids and widths of the embodiments: both published tables are contained."""

from __future__ import annotations

from typing import Any

import pytest

from cosmos3_core.embodiments import EMBODIMENTS, find_embodiment
from cosmos3_core.errors import RequestError


def table(text: str) -> dict[str, int]:
    """ "av 1, umi 6" -> {"av": 1, "umi": 6}."""
    return {name: int(number) for name, number in (entry.split() for entry in text.split(","))}


# diffusers 0.42.1.
DIFFUSERS_IDS = table(
    "no_action 0, av 1, camera_pose 2, hand_pose 3, pusht 4, libero 5, umi 6, bridge_orig_lerobot 7, droid_lerobot 8,"
    "robomind-franka 8, galbot 9, robomind-franka-dual 12, robomind-ur 13, agibotworld 15, agibot_gear_gripper 15,"
    "agibot_gear_gripper_ext 15, fractal 20"
)
DIFFUSERS_WIDTHS = table(
    "av 9, camera_pose 9, hand_pose 57, pusht 2, umi 10, bridge_orig_lerobot 10, droid_lerobot 10, robomind-franka 10,"
    "robomind-ur 10, fractal 10, robomind-franka-dual 20, agibotworld 29, agibot_gear_gripper 29,"
    "agibot_gear_gripper_ext 29, galbot 30"
)
# vLLM-Omni 0.30 and NVIDIA's cosmos-framework.
FRAMEWORK_IDS = table(
    "no_action 0, av 1, camera_pose 2, hand_pose 3, pusht 4, libero 5, umi 6, bridge_orig_lerobot 7, droid_lerobot 8,"
    "robomind-franka 8, embodiment_b 9, galbot 9, robomind-franka-dual 12, robomind-ur 13, agibotworld 15,"
    "embodiment_c_gripper 15, embodiment_c_gripper_ext 15, agibot_gear_gripper 15, agibot_gear_gripper_ext 15,"
    "xdof_yam 16, molmoact2_yam 16, abc_yam 16, fractal 20, drawanything 21, behavior1k_lerobot 22, maniparena 23"
)


def test_both_published_tables_are_contained() -> None:
    ids = {name: embodiment.domain_id for name, embodiment in EMBODIMENTS.items()}
    assert ids == {**DIFFUSERS_IDS, **FRAMEWORK_IDS}
    widths = {name: EMBODIMENTS[name].raw_action_dim for name in DIFFUSERS_IDS}
    assert widths == {name: DIFFUSERS_WIDTHS.get(name) for name in DIFFUSERS_IDS}
    assert widths["libero"] is widths["no_action"] is None


def test_names_of_one_domain_agree_on_the_width() -> None:
    widths: dict[int, set[int | None]] = {}
    for name, embodiment in EMBODIMENTS.items():
        assert embodiment.name == name
        assert 0 <= embodiment.domain_id < 32
        assert embodiment.raw_action_dim is None or 1 <= embodiment.raw_action_dim <= 64
        widths.setdefault(embodiment.domain_id, set()).add(embodiment.raw_action_dim)
    assert all(len(found) == 1 for found in widths.values())


def test_the_table_is_that_of_the_installed_diffusers() -> None:
    from diffusers.pipelines.cosmos import pipeline_cosmos3_omni as theirs

    tables = [value for value in vars(theirs).values() if isinstance(value, dict) and "bridge_orig_lerobot" in value]
    assert len(tables) == 2, "ids, and widths"
    for table in tables:
        expected = DIFFUSERS_IDS if table.get("libero") == 5 else DIFFUSERS_WIDTHS
        assert table == expected


@pytest.mark.parametrize(
    ("name", "domain_id", "found"),
    [
        ("av", None, "av"),
        (" AV ", None, "av"),
        ("RoboMind-Franka", 8, "robomind-franka"),
        (None, 8, "droid_lerobot"),
        (None, 0, "no_action"),
        (None, 10, "domain 10"),
        (None, 31, "domain 31"),
    ],
)
def test_by_name_by_id_or_both(name: str | None, domain_id: int | None, found: str) -> None:
    embodiment = find_embodiment(name, domain_id, 32)
    assert embodiment.name == found
    assert embodiment.domain_id == (EMBODIMENTS[found].domain_id if found in EMBODIMENTS else domain_id)


@pytest.mark.parametrize(
    ("name", "domain_id", "num_domains", "field", "said"),
    [
        (None, None, 32, "domain_name", "give domain_name or domain_id"),
        ("r2d2", None, 32, "domain_name", "bridge_orig_lerobot"),
        ("", None, 32, "domain_name", "bridge_orig_lerobot"),
        (7, None, 32, "domain_name", "bridge_orig_lerobot"),
        ("av", 2, 32, "domain_id", "1, that of av"),
        ("r2d2", 1, 32, "domain_name", "av"),
        (None, -1, 32, "domain_id", "0 to 31"),
        (None, 32, 32, "domain_id", "0 to 31"),
        (None, True, 32, "domain_id", "whole number"),
        (None, "7", 32, "domain_id", "whole number"),
        ("av", 99, 32, "domain_id", "0 to 31"),
        ("fractal", None, 20, "domain_name", "20 domains"),
    ],
)
def test_what_names_none_is_refused(name: Any, domain_id: Any, num_domains: int, field: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        find_embodiment(name, domain_id, num_domains)
    assert caught.value.field == field
    assert said in str(caught.value)
