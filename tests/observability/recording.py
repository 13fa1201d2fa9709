"""Metrics and meters that record, in place of Ray's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deployments.observability.metrics import Metrics


class RecordingMetrics(Metrics):
    """Metrics whose values stay here as name, value and labels."""

    def __init__(self) -> None:
        self.values: list[tuple[str, float, dict[str, str]]] = []
        super().__init__(lambda metric: lambda value, labels: self.values.append((metric.name, value, labels)))

    def values_of(self, name: str) -> list[tuple[Any, ...]]:
        """List a metric's values, each with its labels."""
        return [(value, *labels.values()) for it, value, labels in self.values if it == name]


class CallRecorder:
    """Stands in for metrics or a gang's meter: takes any call and records it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values: self.calls.append((name, values))

    def calls_of(self, name: str) -> list[tuple[Any, ...]]:
        """List the arguments of a method's calls."""
        return [values for it, values in self.calls if it == name]
