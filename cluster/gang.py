"""A gang: the rank actors that run one model together, placed, started, called and failing as one.

It is owned by the leader, a Serve replica without a GPU of its own, and lives in the replica's placement group; when
the leader dies, its ranks and the group go with it. Bring-up is numbered, and every error says how far it came:

    1 place    order the placement group's bundles: rank 0 beside the leader, a node's ranks adjacent
    2 start    one actor a bundle, each in its own process
    3 meet     rank 0 opens a port, all ranks make their process groups (not where a gang is one rank)
    4 load     every rank loads its share of the transformer
    5 warm up  one small request through all ranks
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import get_current_placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import GangFailed
from cluster.rank import Rank, RankInfo, RankSpec
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.errors import Cosmos3Error
from cosmos3_core.shapes import LatentShape

logger = logging.getLogger("ray.serve")

_WARM_UP = DenoiseRequest(
    text_ids=(1, 2),
    negative_text_ids=(2,),
    latent_shape=LatentShape(2, 2, 2),
    fps=24.0,
    num_inference_steps=2,
    guidance_scale=2.0,
    schedule="native",
    flow_shift=10.0,
    seed=0,
)


@dataclass(frozen=True)
class GangSpec:
    """A gang to be.

    Attributes:
        rank: what each loads, and the layout that says how many there are.
        cpus_per_rank, gpus_per_rank: what each takes of its bundle.
        start_timeout_s: for each phase of the bring-up.
    """

    rank: RankSpec
    cpus_per_rank: float
    gpus_per_rank: float
    start_timeout_s: float

    @property
    def num_ranks(self) -> int:
        """Rank actors in a gang."""
        return self.rank.layout.num_ranks


def bundles(spec: GangSpec, leader_cpus: float) -> list[dict[str, float]]:
    """The placement group of one gang: a bundle a rank, the leader in the first one."""
    one = {"CPU": spec.cpus_per_rank, **({"GPU": spec.gpus_per_rank} if spec.gpus_per_rank else {})}
    first = {**one, "CPU": one["CPU"] + leader_cpus}
    return [first] + [dict(one) for _ in range(spec.num_ranks - 1)]


def rank_order(bundle_nodes: Mapping[int, str], leader_node: str) -> list[int]:
    """Bundle indices in rank order: the leader's node first, then node by node."""
    return sorted(bundle_nodes, key=lambda bundle: (bundle_nodes[bundle] != leader_node, bundle_nodes[bundle], bundle))


class Gang:
    """Running ranks; make one with :meth:`start`."""

    def __init__(self, actors: list[Any], infos: list[RankInfo]) -> None:
        self._actors = actors
        self.infos = infos

    @classmethod
    async def start(cls, spec: GangSpec) -> Gang:
        """Bring a gang up in the current placement group.

        Raises:
            GangFailed: it did not come up; says in which phase.
            CheckpointError, RequestError: the checkpoint or the device cannot be used.
        """
        order = _placed_bundles(spec)
        gang = cls(_start_actors(spec, order), [])
        try:
            gang.infos = await gang.call("describe", phase="start", timeout_s=spec.start_timeout_s)
            logger.info("gang 2/5 start: ranks %s", [(info.rank, info.pid) for info in gang.infos])
            if spec.num_ranks > 1:
                address, port = await gang.first("host", phase="meet", timeout_s=spec.start_timeout_s)
                await gang.call("join", address, port, phase="meet", timeout_s=spec.start_timeout_s)
                logger.info("gang 3/5 meet: %s at %s:%s", spec.rank.layout, address, port)
            seconds = await gang.call("load", phase="load", timeout_s=spec.start_timeout_s)
            logger.info("gang 4/5 load: %.1f s", max(seconds))
            for method, arguments in (
                ("begin", ("warm up", _WARM_UP)),
                ("step", ("warm up", 2)),
                ("end", ("warm up",)),
            ):
                await gang.call(method, *arguments, phase="warm up", timeout_s=spec.start_timeout_s)
            logger.info("gang 5/5 warm up: done")
        except BaseException:
            gang.stop()
            raise
        return gang

    async def first(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> Any:
        """Call a method on rank 0 alone; as :meth:`call` otherwise."""
        return (await Gang(self._actors[:1], []).call(method, *arguments, phase=phase, timeout_s=timeout_s))[0]

    async def call(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> list[Any]:
        """Call a method on every rank and wait for all of them.

        Returns:
            The results in rank order.

        Raises:
            GangFailed: a rank died, did not answer in time, or failed by a fault that is not the request's.
            Cosmos3Error: what a rank raised on purpose.
        """
        refs = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        try:
            async with asyncio.timeout(timeout_s):
                return list(await asyncio.gather(*refs))
        except TimeoutError:
            raise GangFailed(phase, f"no answer from {method}() within {timeout_s:.0f} s") from None
        except Cosmos3Error:
            raise
        except RayActorError as error:
            raise GangFailed(phase, f"a rank died in {method}(): {error}") from None
        except RayError as error:
            raise GangFailed(phase, f"{method}() failed on a rank: {error}") from None

    def stop(self) -> None:
        """End every rank's process."""
        for actor in self._actors:
            ray.kill(actor)


def _placed_bundles(spec: GangSpec) -> list[int]:
    group = get_current_placement_group()
    if group is None:
        raise GangFailed("place", "the leader is not in a placement group")
    nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    if len(nodes) != spec.num_ranks:
        raise GangFailed("place", f"the placement group has {len(nodes)} bundles for {spec.num_ranks} ranks")
    order = rank_order(nodes, ray.get_runtime_context().get_node_id())
    logger.info("gang 1/5 place: bundles in rank order %s", order)
    return order


def _start_actors(spec: GangSpec, order: list[int]) -> list[Any]:
    group = get_current_placement_group()
    actor_class = ray.remote(Rank)
    return [
        actor_class.options(
            num_cpus=spec.cpus_per_rank,
            num_gpus=spec.gpus_per_rank,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=bundle, placement_group_capture_child_tasks=True
            ),
        ).remote(rank, spec.rank)
        for rank, bundle in enumerate(order)
    ]
