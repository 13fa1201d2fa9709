"""What an app takes of a Ray cluster, and in words what the cluster lacks for it."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.gang import bundles
from deployments.app import gang_spec
from deployments.config import AppConfig

_KINDS = ("CPU", "GPU")

Resources = Mapping[str, float]
"""Ray's name of a resource -> how much of it."""


def needed(config: AppConfig) -> Resources:
    """What the fewest replicas of all stages take together.

    Raises:
        Cosmos3Error: the checkpoint or the layout cannot be used.
    """
    gang = bundles(gang_spec(config), config.transformer.num_cpus)
    total = dict.fromkeys(_KINDS, 0.0)
    for stage in (config.ingress, config.director, config.tokenizer, config.transformer, config.vae, config.encoder):
        replica = gang if stage is config.transformer else [{"CPU": stage.num_cpus, "GPU": stage.num_gpus}]
        num_replicas = stage.autoscaling.min_replicas if stage.autoscaling else stage.num_replicas
        for kind in _KINDS:
            total[kind] += num_replicas * sum(part.get(kind, 0) for part in replica)
    return total


def missing(needed: Resources, free: Resources) -> str:
    """A sentence about what is missing, "" if nothing is."""
    lacks = {kind: round(needed[kind] - free.get(kind, 0), 4) for kind in _KINDS}
    lacks = {kind: amount for kind, amount in lacks.items() if amount > 0}
    if not lacks:
        return ""
    has = {kind: free.get(kind, 0) for kind in _KINDS}
    return f"{_words(lacks)} missing: the app needs {_words(needed)}, Ray has {_words(has)} for it."


def _words(resources: Resources) -> str:
    return " and ".join(f"{round(amount, 4):g} {kind}" for kind, amount in resources.items())
