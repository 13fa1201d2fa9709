"""The embodiments whose actions the model knows: names, domain ids, and numbers in an action.

The published tables of diffusers 0.42.1 and NVIDIA's cosmos-framework, merged; they do not contradict each other. A
domain id chooses the weights of the action projections; several names may share one. No torch here.

One arm's action is 10 numbers: a 9-number pose (translation, then a rotation as two columns of its matrix; Zhou et al.
2019) and the gripper. Two arms have 20; a humanoid has its own pose and both arms, 29; two hands with 15 finger
coordinates each and the wearer's pose, 57.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos3_core import checks
from cosmos3_core.errors import RequestError


@dataclass(frozen=True)
class Embodiment:
    """A robot, vehicle, hand or camera that acts.

    Attributes:
        name: its first published name.
        domain_id: row of the action projections.
        raw_action_dim: numbers in an action; None if the data set decides and a request must give it.
    """

    name: str
    domain_id: int
    raw_action_dim: int | None


_TABLE = (
    ("no_action", 0, None),
    ("av", 1, 9),
    ("camera_pose", 2, 9),
    ("hand_pose", 3, 57),
    ("pusht", 4, 2),
    ("libero", 5, None),  # 7, 10 or 13, by its rotations
    ("umi", 6, 10),
    ("bridge_orig_lerobot", 7, 10),
    ("droid_lerobot", 8, 10),
    ("robomind-franka", 8, 10),
    ("galbot", 9, 30),
    ("embodiment_b", 9, 30),  # galbot, as cosmos-framework calls it
    ("robomind-franka-dual", 12, 20),
    ("robomind-ur", 13, 10),
    ("agibotworld", 15, 29),
    ("agibot_gear_gripper", 15, 29),
    ("agibot_gear_gripper_ext", 15, 29),
    ("embodiment_c_gripper", 15, 29),  # agibot's, as cosmos-framework calls them
    ("embodiment_c_gripper_ext", 15, 29),
    ("xdof_yam", 16, 20),
    ("molmoact2_yam", 16, 20),
    ("abc_yam", 16, 20),
    ("fractal", 20, 10),
    ("drawanything", 21, 3),
    ("behavior1k_lerobot", 22, 23),
    ("maniparena", 23, 20),
)
EMBODIMENTS = {name: Embodiment(name, domain_id, width) for name, domain_id, width in _TABLE}


def find_embodiment(domain_name: str | None, domain_id: int | None, num_domains: int) -> Embodiment:
    """Return the embodiment that a request names, by name, by id, or by both if they agree.

    Args:
        domain_name: a published name, in any case.
        domain_id: 0 to ``num_domains`` - 1; one without a name is an embodiment of unknown width.

    Raises:
        RequestError: neither is given, the name is unknown, or they contradict each other.
    """
    if domain_id is not None:
        checks.integer("domain_id", domain_id, 0, num_domains - 1)
    if domain_name is None:
        if domain_id is None:
            hint = "actions need an embodiment; give domain_name or domain_id"
            raise RequestError("domain_name", None, f"one of {list(EMBODIMENTS)}", hint)
        named = (embodiment for embodiment in EMBODIMENTS.values() if embodiment.domain_id == domain_id)
        return next(named, Embodiment(f"domain {domain_id}", domain_id, None))
    name = domain_name.lower().strip() if isinstance(domain_name, str) else domain_name
    found = EMBODIMENTS[checks.choice("domain_name", name, tuple(EMBODIMENTS))]
    if domain_id not in (None, found.domain_id):
        hint = "leave out one of the two"
        raise RequestError("domain_id", domain_id, f"{found.domain_id}, that of {found.name}", hint)
    if found.domain_id >= num_domains:
        raise RequestError("domain_name", domain_name, f"one of the {num_domains} domains that this checkpoint has")
    return found
