"""The resources that an app needs of a Ray cluster, and a sentence about what the cluster lacks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from cluster.gang import GangSpec, make_bundles
from cluster.transformer_rank import TransformerSpec
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.parallel.layout import Layout
from cosmos3_core.parallel.sharding import list_tp_sizes
from deployments.app import make_gang_spec, make_vae_gang_spec
from deployments.config import AppConfig, GangStage, Stage, TransformerStage, VideoVAEStage

_KINDS = ("CPU", "GPU")
_MAX_EXAMPLES = 4

Resources = Mapping[str, float]
"""Ray's resource name -> amount."""


@dataclass(frozen=True)
class Node:
    """A node of a cluster: its total resources, used or not, and its labels."""

    resources: Resources
    labels: Mapping[str, str]


def sum_needs(config: AppConfig) -> Resources:
    """Return the resources of all stages with their fewest replicas; raise Cosmos3Error for an unusable layout."""
    checkpoint = CheckpointLayout.open(config.checkpoint)
    gang = make_gang_spec(config, config.transformer, checkpoint)
    return _sum_needs(config, checkpoint, gang, _count_replicas(config.transformer))


def describe_missing(needs: Resources, free: Resources) -> str:
    """Describe the missing resources in a sentence; "" if none are missing."""
    lacks = {kind: round(needs[kind] - free.get(kind, 0), 4) for kind in _KINDS}
    lacks = {kind: amount for kind, amount in lacks.items() if amount > 0}
    if not lacks:
        return ""
    has = {kind: free.get(kind, 0) for kind in _KINDS}
    return f"{_format(lacks)} missing: the app needs {_format(needs)}, Ray has {_format(has)} for it."


def describe_shortfall(config: AppConfig, nodes: Sequence[Node]) -> str:
    """Describe why these nodes cannot hold the app, even if all their resources were free; "" if they can.

    Compares sums, and each gang of the stages ``transformer`` and ``vae`` with single nodes. It does not solve the
    packing of all stages. Raises as :func:`sum_needs`.
    """
    checkpoint = CheckpointLayout.open(config.checkpoint)
    gang = make_gang_spec(config, config.transformer, checkpoint)
    num_gangs = _count_replicas(config.transformer)
    lack = _describe_lack(config, checkpoint, gang, num_gangs, nodes)
    return f"{lack} {_suggest_layouts(config, checkpoint, gang, num_gangs, nodes)}".rstrip() if lack else ""


def _describe_lack(
    config: AppConfig, checkpoint: CheckpointLayout, gang: GangSpec, num_gangs: int, nodes: Sequence[Node]
) -> str:
    needs = _sum_needs(config, checkpoint, gang, num_gangs)
    if lack := describe_missing(needs, _sum([node.resources for node in nodes])):
        return lack
    num_ranks, num_cards = num_gangs * gang.rank.num_ranks, sum(int(node.resources.get("GPU", 0)) for node in nodes)
    if (cards := _count_cards(num_ranks, gang.gpus_per_rank)) > num_cards:
        return f"{num_ranks} ranks of {gang.gpus_per_rank:g} GPU each need {cards} cards, and there are {num_cards}."
    for name, stage in _list_stages(config, checkpoint).items():
        if not _find_nodes(nodes, stage):
            labels = ", ".join(f"{key}: {value}" for key, value in stage.node_labels.items())
            return f"No node has the labels that {name}.node_labels asks for ({labels})."
    return _describe_misfit(config.transformer, gang, nodes) or _describe_misfit(
        config.vae, make_vae_gang_spec(config, checkpoint), nodes
    )


def _list_stages(config: AppConfig, checkpoint: CheckpointLayout) -> dict[str, Stage]:
    names = ["ingress", "director", "tokenizer", "transformer", "unguided", "vae", "encoder"]
    if config.audio.decodes_sound(checkpoint):
        names.append("audio")
    if config.guardrails.adapter is not None:
        names.append("guardrail")
    return {name: stage for name in names if (stage := getattr(config, name)) is not None}


def _count_cards(num_ranks: int, share: float) -> int:
    """Return the fewest cards for a number of ranks; one rank's share never spans two cards."""
    return math.ceil(num_ranks / int(1 / share + 1e-9)) if share else 0


def _count_replicas(stage: Stage) -> int:
    return stage.autoscaling.min_replicas if stage.autoscaling else stage.num_replicas


def _sum_needs(config: AppConfig, checkpoint: CheckpointLayout, gang: GangSpec, num_gangs: int) -> Resources:
    parts = num_gangs * make_bundles(gang, config.transformer.num_cpus)
    for name, stage in _list_stages(config, checkpoint).items():
        if name == "transformer":
            continue
        if isinstance(stage, TransformerStage):
            replica = make_bundles(make_gang_spec(config, stage, checkpoint), stage.num_cpus)
        elif isinstance(stage, VideoVAEStage):
            replica = make_bundles(make_vae_gang_spec(config, checkpoint), stage.num_cpus)
        else:
            replica = [{"CPU": stage.num_cpus, "GPU": stage.num_gpus}]
        parts += _count_replicas(stage) * replica
    return _sum(parts)


def _sum(parts: Sequence[Resources]) -> dict[str, float]:
    return {kind: sum(part.get(kind, 0.0) for part in parts) for kind in _KINDS}


def _suggest_layouts(
    config: AppConfig, checkpoint: CheckpointLayout, gang: GangSpec, max_gangs: int, nodes: Sequence[Node]
) -> str:
    """Return a sentence that names the largest layouts which the nodes can hold; "" if there are none."""
    rank = gang.rank
    assert isinstance(rank, TransformerSpec)
    allowed_tp = list_tp_sizes(checkpoint.transformer)
    degrees = range(1, rank.num_ranks + 1)
    # Preferred layouts first: the traffic between ranks grows from CFG to SP to TP.
    layouts = [Layout(tp, cfg, sp) for tp, sp, cfg in product(allowed_tp, degrees, (2, 1)) if tp * sp * cfg in degrees]
    for num_gangs in range(max_gangs, 0, -1):
        specs = [(layout, replace(gang, rank=replace(rank, layout=layout))) for layout in layouts]
        fitting = [layout for layout, spec in specs if not _describe_lack(config, checkpoint, spec, num_gangs, nodes)]
        most = max((layout.num_ranks for layout in fitting), default=0)
        key = "--set transformer.autoscaling.min_replicas=" if config.transformer.autoscaling else "--gangs "
        largest = [layout for layout in fitting if layout.num_ranks == most]
        flags = [f"--tp {it.tp} --cfg {it.cfg} --sp {it.sp} {key}{num_gangs}" for it in largest]
        if flags:
            return f"What fits: {', or '.join(flags[:_MAX_EXAMPLES])}."
    return ""


def _describe_misfit(stage: GangStage, spec: GangSpec, nodes: Sequence[Node]) -> str:
    """Describe why not even one gang of a stage fits these nodes under its placement strategy; "" if one fits."""
    gang, strategy, nodes = make_bundles(spec, stage.num_cpus), stage.placement_strategy, _find_nodes(nodes, stage)
    num_cards = spec.rank.num_ranks if isinstance(stage, VideoVAEStage) and stage.beside_transformer else 0
    if num_cards > max((node.resources.get("GPU", 0) for node in nodes), default=0):
        return f"vae.beside_transformer wants {num_cards} cards on one node, one for each of vae.ranks; none has them."
    if strategy == "STRICT_PACK":
        whole = _sum(gang)
        whole["GPU"] = max(whole["GPU"], _count_cards(len(gang), gang[0].get("GPU", 0)))
        if any(_holds(node, whole) for node in nodes):
            return ""
        return (
            f"placement_strategy STRICT_PACK wants all {len(gang)} ranks of a gang on one node, and none has "
            f"{_format(whole)}; PACK takes several nodes."
        )
    a_rank, with_leader = _sum(gang[-1:]), _sum(gang[:1])
    num_wanted = len(gang) if strategy == "STRICT_SPREAD" else 1
    num_there = sum(_holds(node, a_rank) for node in nodes)
    if num_there < num_wanted or not any(_holds(node, with_leader) for node in nodes):
        return (
            f"placement_strategy {strategy} wants {num_wanted} nodes with {_format(a_rank)} for a rank, one with "
            f"{_format(with_leader)} for the leader too; there are {num_there}."
        )
    return ""


def _holds(node: Node, wanted: Resources) -> bool:
    return not describe_missing(wanted, node.resources)


def _find_nodes(nodes: Sequence[Node], stage: Stage) -> list[Node]:
    """Return the nodes with the labels that the stage requires. A missing label is unequal to every value."""
    wanted = stage.node_labels.items()
    return [node for node in nodes if all(_matches(node.labels.get(key), value) for key, value in wanted)]


def _matches(label: str | None, selector: str) -> bool:
    is_wanted = not selector.startswith("!")
    return (label in re.findall(r"[\w.-]+", re.sub(r"^!?(in\()?", "", selector))) == is_wanted


def _format(resources: Resources) -> str:
    return " and ".join(f"{round(amount, 4):g} {kind}" for kind, amount in resources.items())
