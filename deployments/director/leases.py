"""The leases of what a runner has in hand: renewed while it runs. Cancellations by owners are found on the way."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from deployments.director.run import Run, Stop
from deployments.jobs.store import JobStore, Lease

logger = logging.getLogger("ray.serve")

# Renewals in the time of a lease: two may fail.
_RENEWALS = 4
# Leases that pass before a runner that cannot renew them stops: a slow database is no reason to begin anew, and of two
# runners that have one job for a while one writes it down.
_PATIENCE = 2
# Between two looks whether the owner of a running job has cancelled it.
_LOOK_S = 0.5
_SHORTEST_TRY_S = 0.1


class Leases:
    """See the module.

    Args:
        store: of jobs.
        runner_id: whose they are.
        lease_s: how long one is valid.
        runs: what is in hand now, by the job's id.

    Attributes:
        patience_s: how long a run goes on when the database is away.
    """

    def __init__(self, store: JobStore, runner_id: str, lease_s: float, runs: Mapping[str, Run]) -> None:
        self._store, self._runner_id, self._lease_s, self._runs = store, runner_id, lease_s, runs
        self.patience_s = _PATIENCE * lease_s
        # A thread of its own: it must not wait behind files that are written.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="leases")

    async def keep(self) -> None:
        """Renew them, for ever, and stop the runs that are not to go on."""
        renewed_s = time.monotonic()
        while True:
            # More often while something runs, for the sake of cancellations.
            await asyncio.sleep(min(self._lease_s / _RENEWALS, _LOOK_S if self._runs else self._lease_s))
            runs = dict(self._runs)
            asked_s = time.monotonic()
            limit_s = max(renewed_s + self.patience_s - asked_s, _SHORTEST_TRY_S)
            try:
                lost, cancelling = await self._renewed(list(runs.values()), limit_s)
            except Exception:  # late, or whatever the database raised
                logger.exception("leases of jobs cannot be renewed")
                self._give_up(list(runs.values()), renewed_s)
                continue
            renewed_s = asked_s
            for job_id in lost:
                runs[job_id].stop(Stop.LOST)
            for job_id in cancelling:
                runs[job_id].stop(Stop.CANCELLED)

    async def _renewed(self, runs: Sequence[Run], limit_s: float) -> tuple[set[str], set[str]]:
        """Ids of jobs that are lost, and of those that were cancelled."""
        leases = [Lease(run.job.job_id, run.job.lease) for run in runs]
        loop = asyncio.get_running_loop()
        renewing = loop.run_in_executor(self._thread, self._store.renew, self._runner_id, leases, self._lease_s)
        async with asyncio.timeout(limit_s):
            return await asyncio.shield(renewing)

    def _give_up(self, runs: Sequence[Run], renewed_s: float) -> None:
        """Stop what another runner has had for a while: it is not run here as well."""
        for run in runs:
            if time.monotonic() - max(renewed_s, run.begun_s) > self.patience_s:
                run.stop(Stop.AWAY)
