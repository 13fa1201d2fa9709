"""A gang: the rank actors that run one model together, placed, started, called and failing as one.

The leader, a Serve replica without a GPU, owns it. The gang lives in the replica's placement group: when the leader
dies, ranks and group go with it. The steps of bring-up are numbered, and every error names the one that failed:

    1 place    order the placement group's bundles: rank 0 beside the leader, a node's ranks adjacent
    2 start    one actor a bundle, each in its own process
    3 meet     rank 0 opens a port, all ranks make their process groups (not where a gang is one rank)
    4 load     every rank loads its share of the model
    5 warm up  a small piece of work through all ranks
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import get_current_placement_group, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.envelope import TensorEnvelope
from cluster.errors import GangFailed, OutOfMemory
from cluster.rank import Loaded, RankInfo, RankSpec
from cosmos3_core.errors import Cosmos3Error

logger = logging.getLogger("ray.serve")

# Ranks refuse a request before they work on it: when one has refused, the others' answers are moments away.
_AGREE_S = 30.0
# Until Ray reports a process that has died.
_DEATH_S = 3.0
# The thread of a rank for calls beside its work, and how long they may take: they only wait for a lock.
_GATE, _GATE_S = "gate", 10.0


@dataclass(frozen=True)
class GangSpec:
    """Settings from which a gang is started.

    Attributes:
        rank: what each rank loads, and how many there are.
        cpus_per_rank, gpus_per_rank: share of its bundle.
        start_timeout_s: for each phase of the bring-up.
    """

    rank: RankSpec
    cpus_per_rank: float
    gpus_per_rank: float
    start_timeout_s: float


def make_bundles(spec: GangSpec, leader_cpus: float) -> list[dict[str, float]]:
    """Return the bundles of one gang's placement group: one a rank, the leader in the first."""
    one = {"CPU": spec.cpus_per_rank, **({"GPU": spec.gpus_per_rank} if spec.gpus_per_rank else {})}
    first = {**one, "CPU": one["CPU"] + leader_cpus}
    return [first] + [dict(one) for _ in range(spec.rank.num_ranks - 1)]


def order_ranks(bundle_nodes: Mapping[int, str], leader_node: str) -> list[int]:
    """Return bundle indices in rank order: the leader's node first, then node by node."""
    return sorted(bundle_nodes, key=lambda bundle: (bundle_nodes[bundle] != leader_node, bundle_nodes[bundle], bundle))


class Gang:
    """The running ranks of a gang, brought up by :meth:`start`.

    Attributes:
        loaded: rank 0's report of loading.
    """

    loaded: Loaded

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors
        self.infos: list[RankInfo] = []

    @classmethod
    async def start(cls, spec: GangSpec) -> Gang:
        """Bring a gang up in the current placement group.

        Raises:
            GangFailed: it did not come up; names the phase.
            CheckpointError, RequestError: the checkpoint or the device cannot be used.
        """
        gang = cls(_start_actors(spec))
        try:
            await gang.call("log_to_stderr", phase="start", timeout_s=spec.start_timeout_s)
            gang.infos = await gang.call("describe", phase="start", timeout_s=spec.start_timeout_s)
            logger.info("gang 2/5 start: ranks %s", [(info.rank, info.pid, info.node_id) for info in gang.infos])
            if spec.rank.num_ranks > 1:
                address, port = await gang.call_rank_0("host", phase="meet", timeout_s=spec.start_timeout_s)
                await gang.call("join", address, port, phase="meet", timeout_s=spec.start_timeout_s)
                logger.info("gang 3/5 meet: %s ranks at %s:%s", spec.rank.num_ranks, address, port)
            loaded: list[Loaded] = await gang.call(
                "load", phase="load", timeout_s=spec.start_timeout_s, reraises=Cosmos3Error
            )
            gang.loaded = loaded[0]
            logger.info("gang 4/5 load: %.1f s, %s", max(it.seconds for it in loaded), loaded[0].ops)
            for method, arguments in spec.rank.warm_up:
                await gang.call(method, *arguments, phase="warm up", timeout_s=spec.start_timeout_s)
            logger.info("gang 5/5 warm up: done")
        except BaseException:
            gang.stop()
            raise
        return gang

    async def call_rank_0(
        self,
        method: str,
        *arguments: Any,
        phase: str,
        timeout_s: float,
        reraises: type[Cosmos3Error] | tuple[()] = (),
    ) -> Any:
        """Call a method on rank 0 alone; otherwise as :meth:`call`."""
        alone = Gang(self._actors[:1])
        return (await alone.call(method, *arguments, phase=phase, timeout_s=timeout_s, reraises=reraises))[0]

    async def call(
        self,
        method: str,
        *arguments: Any,
        phase: str,
        timeout_s: float,
        reraises: type[Cosmos3Error] | tuple[()] = (),
    ) -> list[Any]:
        """Call a method on every rank and wait for all of them; the first failure fails the call.

        Args:
            method, arguments: of the ranks' class.
            phase: for messages.
            timeout_s: for all of them.
            reraises: errors to raise as they are, not as a :class:`GangFailed`.

        Returns:
            The results in rank order.

        Raises:
            GangFailed: a rank died, raised, or did not answer in time; names it.
        """
        calls = await self._await_first_failure(method, arguments, timeout_s)
        errors = _collect_errors(calls)
        for error in errors.values():
            if isinstance(error, reraises):
                raise error
        return _collect_results(calls, errors, method, phase, timeout_s)

    async def call_or_refuse(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> list[Any]:
        """Call as :meth:`call`, but let the ranks refuse: all of them alike, or the gang has failed.

        Out of memory is a refusal only for a rank alone. Several may have broken off an exchange, and the next request
        would meet the rest of it.

        Raises:
            Cosmos3Error: raised by every rank.
            GangFailed: as :meth:`call`; or some ranks refused and others did not.
        """
        calls = await self._await_first_failure(method, arguments, timeout_s)
        # An error that is no refusal fails the gang: do not wait, other ranks may hang in an exchange with that one.
        errors = _collect_errors(calls)
        if errors and all(_may_be_refusal(error, len(calls)) for error in errors.values()):
            await asyncio.wait(calls, timeout=min(_AGREE_S, timeout_s))
        errors = _collect_errors(calls)
        if len({(type(error), str(error)) for error in errors.values()}) == 1 and len(errors) == len(calls):
            error = errors[0]
            if _may_be_refusal(error, len(calls)):
                raise error
        return _collect_results(calls, errors, method, phase, timeout_s)

    async def call_gates(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method of every rank's gate between layers, beside the step that runs; return the answers.

        Raise TimeoutError or RayError if a rank does not answer; the call of the step says why.
        """
        calls = [actor.call_gate.options(concurrency_group=_GATE).remote(method, *arguments) for actor in self._actors]
        async with asyncio.timeout(_GATE_S):
            return list(await asyncio.gather(*calls))

    async def _await_first_failure(
        self, method: str, arguments: tuple[Any, ...], timeout_s: float
    ) -> list[asyncio.Future[Any]]:
        """Call every rank; return when all are done, or one has failed, or the time is up."""
        calls = self._calls(method, arguments)
        await asyncio.wait(calls, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        errors = _collect_errors(calls).values()
        if any(not isinstance(error, Cosmos3Error | RayActorError) for error in errors) and len(errors) < len(calls):
            # Other ranks notice a rank's death in their exchange with it, sooner than Ray does.
            await asyncio.wait(calls, timeout=_DEATH_S)
        return calls

    def _calls(self, method: str, arguments: tuple[Any, ...]) -> list[asyncio.Future[Any]]:
        # Put it into the object store once for all ranks.
        shared = [ray.put(it) if isinstance(it, TensorEnvelope) else it for it in arguments]
        return [asyncio.ensure_future(getattr(actor, method).remote(*shared)) for actor in self._actors]

    def stop(self) -> None:
        """End every rank's process."""
        for actor in self._actors:
            ray.kill(actor)


def _start_actors(spec: GangSpec) -> list[Any]:
    """Start one actor in each bundle of the current placement group, in rank order."""
    group = get_current_placement_group()
    if group is None:
        raise GangFailed("place", "the leader is not in a placement group")
    nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    if len(nodes) != spec.rank.num_ranks:
        raise GangFailed("place", f"the placement group has {len(nodes)} bundles for {spec.rank.num_ranks} ranks")
    order = order_ranks(nodes, ray.get_runtime_context().get_node_id())
    logger.info("gang 1/5 place: bundles in rank order %s", order)
    actor_class = ray.remote(concurrency_groups={_GATE: 1})(spec.rank.rank_class)
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


def _may_be_refusal(error: BaseException, num_ranks: int) -> bool:
    return isinstance(error, Cosmos3Error) and not (isinstance(error, OutOfMemory) and num_ranks > 1)


def _collect_errors(calls: list[asyncio.Future[Any]]) -> dict[int, BaseException]:
    """Return rank -> its call's error, without Ray's wrapping. Cancel nothing: a rank may still be at work."""
    errors = {}
    for rank, call in enumerate(calls):
        if call.done() and (error := call.exception()) is not None:
            if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
                error = error.cause
            errors[rank] = error
    return errors


def _collect_results(
    calls: list[asyncio.Future[Any]], errors: dict[int, BaseException], method: str, phase: str, timeout_s: float
) -> list[Any]:
    """Return every rank's result; raise GangFailed from the error of a rank that has none."""
    for rank, error in errors.items():
        if isinstance(error, RayActorError):
            raise GangFailed(phase, f"died in {method}(): {error}", rank) from error
    for rank, error in errors.items():
        raise GangFailed(phase, f"{method}() raised {type(error).__name__}: {error}", rank) from error
    silent = [rank for rank, call in enumerate(calls) if not call.done()]
    if silent:
        # A hanging rank makes others hang: it is known only if it alone is silent.
        reason = f"no answer from {method}() within {timeout_s:.0f} s"
        if len(silent) == 1:
            raise GangFailed(phase, reason, silent[0])
        raise GangFailed(phase, f"{reason} on ranks {silent}")
    return [call.result() for call in calls]
