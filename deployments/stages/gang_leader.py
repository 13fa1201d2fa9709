"""Base of gang leaders, which report their gang's health and end with it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from cluster.errors import GangFailed
from cluster.gang import Gang
from deployments.threads import exit_soon


class GangLeader(ABC):
    """Base of deployments that lead a gang. A leader holds no weights and touches no GPU."""

    _gang: Gang

    @property
    @abstractmethod
    def _failure(self) -> GangFailed | None:
        """The gang's failure; None while it works."""

    async def check_health(self) -> None:
        """Fail Serve's health check once the gang has failed; the process usually exits before the next check."""
        if self._failure is not None:
            raise self._failure

    def _exit_soon(self) -> None:
        """Stop the ranks and exit: Serve replaces the leader, which starts a new gang."""
        self._gang.stop()
        exit_soon()
