"""Apps on a Ray cluster of several nodes, in a process of its own: ``python two_nodes.py CHECKPOINT`` prints a report.

Not a test: ``test_autoscaling.py`` runs it, because a process has one Ray and the other tests share another. All nodes
are on this machine, in zones "a" (the head), "b" and so on.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# Ray reads these once, when it is imported or its processes start.
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_worker_niceness": "0",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.02",
    "OMP_NUM_THREADS": "1",
}

import ray
import ray.serve._private.client as serve_client
from ray import serve
from ray.cluster_utils import Cluster

from cluster.events import StepDone
from cosmos3_core.request import GenerationRequest
from deployments import messages
from deployments.app import build_app
from deployments.config import DEFAULT_CONFIG, AppConfig
from deployments.launch.ray_session import can_grow
from tests.app.director_client import DirectorClient, connect

SMALL = GenerationRequest(prompt="A red car.", num_frames=5, height=64, width=64, num_inference_steps=4, seed=5)
# It spends most of its time with a gang, so that callers create load there.
STEPPING = replace(SMALL, num_inference_steps=12)
DEADLINE_S = 300.0
CPUS_PER_NODE = 8


class Nodes:
    """The cluster, and the zone of each process."""

    def __init__(self) -> None:
        self._common = {"num_cpus": CPUS_PER_NODE, "object_store_memory": 128 * 2**20}
        head = {**self._common, "include_dashboard": False, "labels": {"zone": "a"}}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = {"a": self.cluster.head_node}
        # The group is what nodes carry that were started for an autoscaler.
        self.add("b", {"ray.io/node-group": "workers"})

    def add(self, zone: str, labels: dict[str, str] | None = None) -> None:
        """Start another node."""
        self._nodes[zone] = self.cluster.add_node(**self._common, labels={"zone": zone, **(labels or {})})

    def remove(self, zone: str) -> None:
        """Kill a node and all that runs on it."""
        self.cluster.remove_node(self._nodes.pop(zone), allow_graceful=False)

    def zone(self, pid: int) -> str:
        """Return the zone of a process of Ray, whose parent is its node's raylet."""
        raylet = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        zones = {node.all_processes["raylet"][0].process.pid: zone for zone, node in self._nodes.items()}
        return zones[raylet]


def app(checkpoint: str, name: str, **overrides: Any) -> serve.RunTarget:
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    config = AppConfig.read(DEFAULT_CONFIG, {"checkpoint": checkpoint, "name": name, **dotted})
    return serve.RunTarget(build_app(config), name=name, route_prefix=f"/{name}")


def of_kind(events: list[Any], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def await_that(holds: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not holds():
        if time.monotonic() > deadline_s:
            raise TimeoutError(what)
        time.sleep(0.05)


def placement(checkpoint: str, nodes: Nodes) -> dict[str, Any]:
    """Return the zones of the processes of two apps with configured placement."""
    spread = {"transformer__cfg": 2, "transformer__placement_strategy": "STRICT_SPREAD"}
    stages = {"vae__node_labels": {"zone": "b"}, "encoder__node_labels": {"zone": "!b"}}
    labelled = {"transformer__cfg": 2, "transformer__node_labels": {"zone": "in(b,c)"}}
    serve.run_many([app(checkpoint, "spread", **spread, **stages), app(checkpoint, "labelled", **labelled)])
    seen = {}
    for name in ("spread", "labelled"):
        events = list(connect(name).stream(SMALL))
        (ready,) = of_kind(events, messages.LatentsReady)
        chunk = of_kind(events, messages.ChunkEncoded)[0]
        seen[name] = {
            "leader": nodes.zone(ready.pid),
            "ranks": [nodes.zone(pid) for pid in ready.rank_pids],
            "vae": nodes.zone(chunk.decoded_by),
            "encoder": nodes.zone(chunk.pid),
        }
        serve.delete(name)
    return seen


class Load:
    """Callers that send requests one after another until stopped."""

    def __init__(self, client: DirectorClient, nodes: Nodes) -> None:
        self._client, self._nodes = client, nodes
        self.gangs: Counter[tuple[int, ...]] = Counter()
        self.zones: dict[tuple[int, ...], list[str]] = {}
        self.frames: set[str] = set()
        self.troubles: list[str] = []
        self._lock = threading.Lock()

    def call(self) -> None:
        """Send one request and record it."""
        try:
            events = list(self._client.stream(STEPPING, timeout_s=DEADLINE_S))
        except Exception as error:  # noqa: BLE001 - what it may be is the question
            with self._lock:
                self.troubles.append(f"{type(error).__name__}: {error}")
            return
        with self._lock:
            self.troubles += [str(event) for event in of_kind(events, messages.StageRetried)]
            self.frames |= {event.frames_sha256 for event in of_kind(events, messages.Finished)}
            for event in of_kind(events, messages.LatentsReady):
                self.gangs[event.rank_pids] += 1
                if event.rank_pids not in self.zones:  # at its first request: an idle gang soon stops
                    self.zones[event.rank_pids] = sorted({self._nodes.zone(pid) for pid in event.rank_pids})

    def run(self, num_callers: int, until: Callable[[], bool], what: str) -> None:
        """Load from that many callers until something holds; their last requests are waited for.

        Raises:
            TimeoutError: the condition did not become true.
        """
        is_over = threading.Event()

        def keep_calling() -> None:
            while not is_over.is_set():
                self.call()

        callers = [threading.Thread(target=keep_calling) for _ in range(num_callers)]
        for caller in callers:
            caller.start()
        try:
            await_that(until, what)
        finally:
            is_over.set()
            for caller in callers:
                caller.join()


def autoscaling(checkpoint: str, nodes: Nodes) -> dict[str, Any]:
    """Load starts a second gang on the other node, since no node has room for two; it stops again later."""
    bounds = {"max_replicas": 2, "target_ongoing_requests": 2}
    pace = {"upscale_delay_s": 0.5, "downscale_delay_s": 3, "look_back_period_s": 1, "metrics_interval_s": 0.2}
    gang = {"transformer__tp": 2, "transformer__cpus_per_rank": 0.3 * CPUS_PER_NODE}
    serve.run_many([app(checkpoint, "scaling", **gang, transformer__autoscaling=bounds | pace)])
    load = Load(connect("scaling"), nodes)
    load.call()
    gangs_before = len(load.gangs)
    start_s = time.monotonic()
    load.run(4, lambda: len(load.gangs) > 1 and min(load.gangs.values()) > 2, "a second gang that serves")
    up_s = time.monotonic() - start_s

    def alive() -> list[tuple[int, ...]]:
        return [ranks for ranks in load.gangs if any(os.path.exists(f"/proc/{pid}") for pid in ranks)]

    start_s = time.monotonic()
    # One caller goes on, and must not notice.
    load.run(1, lambda: len(alive()) == 1, "the second gang's end")
    down_s = time.monotonic() - start_s
    served = load.gangs.copy()
    load.call()
    return {
        "gangs_before": gangs_before,
        "zones": sorted(load.zones.values()),
        "num_gangs": len(load.gangs),
        "last_served_by_one_alive": (load.gangs - served).keys() == set(alive()),
        "num_requests": load.gangs.total(),
        "troubles": load.troubles,
        "frames": sorted(load.frames),
        "up_s": up_s,
        "down_s": down_s,
    }


def lose_node(checkpoint: str, nodes: Nodes) -> dict[str, Any]:
    """The gang's node goes away while it denoises, and the next one's when it has just finished."""
    here = {f"{stage}__node_labels": {"zone": "a"} for stage in ("ingress", "director", "tokenizer", "vae", "encoder")}
    there = {"transformer__node_labels": {"zone": "!a"}, "transformer__save_period_s": 0.3}
    nodes.add("c")
    nodes.add("d")
    serve.run_many([app(checkpoint, "lost", **here, **there)])
    client = connect("lost")
    request = replace(SMALL, num_frames=17, num_inference_steps=500)
    (undisturbed,) = of_kind(list(client.stream(request, timeout_s=DEADLINE_S)), messages.Finished)
    seen: dict[str, Any] = {"undisturbed": undisturbed.frames_sha256}
    for name, kind in (("denoising", messages.StateSaved), ("decoding", messages.LatentsReady)):
        events, is_gone = [], False
        for event in client.stream(request, timeout_s=DEADLINE_S):
            events.append(event)
            if isinstance(event, kind) and not is_gone:
                is_gone = True
                nodes.remove(nodes.zone(event.pid))
        saved = [event.step for event in of_kind(events, messages.StateSaved)]
        retried = of_kind(events, messages.StageRetried)
        steps = [event.step for event in of_kind(events, StepDone)]
        seen[name] = {
            "frames": [event.frames_sha256 for event in of_kind(events, messages.Finished)],
            "saved": saved[:1],
            "retried": [(event.stage, event.from_step) for event in retried],
            "num_steps": len(steps),
        }
    serve.delete("lost")
    return seen


PHASES = {"placement": placement, "autoscaling": autoscaling, "lost_node": lose_node}


def main(checkpoint: str) -> None:
    serve_client.CLIENT_POLLING_INTERVAL_S = 0.05
    nodes = Nodes()
    try:
        ray.init(nodes.cluster.address, log_to_driver=False, logging_level="ERROR")
        serve.start(proxy_location="Disabled")
        seen = {
            "can_grow": can_grow(),
            **{name: phase(checkpoint, nodes) for name, phase in PHASES.items()},
        }
    finally:
        ray.shutdown()  # stopping the nodes stops Serve too, and faster
        nodes.cluster.shutdown()
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
