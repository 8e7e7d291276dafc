"""Exports the statistics of an allocator to Prometheus, read at each scrape.

Needs ``prometheus-client`` (``pip install cumempool[prometheus]``)::

    from prometheus_client import REGISTRY
    from cumempool.integrations.prometheus import CuMemCollector

    REGISTRY.register(CuMemCollector(allocator))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from cumempool._pool.stats import Stats

if TYPE_CHECKING:
    from prometheus_client import Metric

    from cumempool.allocator import CuMemAllocator

__all__ = ["CuMemCollector"]

_STATES: Final = ("awake", "backed_up", "discarded")
_GAUGES: Final[Mapping[str, str]] = {
    "reserved_address_bytes": "Address space held from the driver.",
    "physical_bytes": "Device memory held from the driver.",
    "peak_physical_bytes": "The most device memory held from the driver at a time.",
    "mapped_bytes": "Device memory that is mapped.",
    "pending_free_bytes": "Freed by the program, not yet given back.",
    "leaked_bytes": "Device memory that the driver refused to take back.",
    "host_bytes": "Pinned host memory held for backups.",
    "host_used_bytes": "Pinned host memory that holds backups.",
    "pageable_bytes": "Pageable host memory held for backups.",
    "file_bytes": "Size of the backup files.",
    "peer_bytes": "Device memory held for backups of other devices.",
    "staging_bytes": "Pinned host memory held for buffers and digests.",
}
_COUNTERS: Final[Mapping[str, str]] = {
    "malloc_calls": "Allocations tried.",
    "malloc_failures": "Allocations that failed.",
    "free_calls": "Frees.",
    "sleeps": "Sleeps and discards that succeeded.",
    "wakes": "Wakes that succeeded.",
    "swaps": "Swaps that succeeded.",
    "failed_transitions": "Transitions that failed and changed nothing.",
}


class CuMemCollector(Collector):
    """Collects the statistics of one allocator as metrics. Sizes are in bytes.

    ``cumempool_tag_bytes`` and ``cumempool_tag_allocations`` (labels ``tag``, ``state``),
    ``cumempool_tag_backup_bytes`` (labels ``tag``, ``tier``, ``retained``), ``cumempool_tag_pins``,
    a gauge for each total of `Stats`, a counter for each count, and
    ``cumempool_last_transition_seconds`` and ``..._copied_bytes`` of each operation.

    Args:
        allocator: The allocator, kept alive by this reference only.
        labels: Labels of all metrics, such as ``{"model": "llama"}``.
    """

    def __init__(self, allocator: CuMemAllocator, labels: Mapping[str, str] | None = None) -> None:
        self._allocator = allocator
        self._names = list(labels or {})
        self._values = list((labels or {}).values())

    def describe(self) -> Iterable[Metric]:
        """Returns no metrics: they depend on the tags, which a registration must not read."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yields the current metrics."""
        stats = self._allocator.stats()
        yield from self._tags(stats)
        for family, texts in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, text in texts.items():
                metric = family(f"cumempool_{name}", text, labels=self._names)
                metric.add_metric(self._values, getattr(stats, name))
                yield metric
        yield from self._transitions()

    def _tags(self, stats: Stats) -> Iterator[Metric]:
        for amount, text in (
            ("bytes", "Bytes of allocations, by state."),
            ("allocations", "Allocations, by state."),
        ):
            labels = [*self._names, "tag", "state"]
            gauge = GaugeMetricFamily(f"cumempool_tag_{amount}", text, labels=labels)
            for tag in stats.tags.values():
                for state in _STATES:
                    held = getattr(tag, f"{state}_{amount}")
                    gauge.add_metric([*self._values, tag.tag, state], held)
            yield gauge
        backups = GaugeMetricFamily(
            "cumempool_tag_backup_bytes",
            "Bytes of backups; retained: of memory that is awake.",
            labels=[*self._names, "tag", "tier", "retained"],
        )
        pins = GaugeMetricFamily(
            "cumempool_tag_pins", "Holders that forbid sleep.", labels=[*self._names, "tag"]
        )
        for tag in stats.tags.values():
            where = [*self._values, tag.tag, tag.backup_tier]
            backups.add_metric([*where, "no"], tag.backup_bytes)
            backups.add_metric([*where, "yes"], tag.retained_bytes)
            pins.add_metric([*self._values, tag.tag], tag.pins)
        yield backups
        yield pins

    def _transitions(self) -> Iterator[Metric]:
        seconds = GaugeMetricFamily(
            "cumempool_last_transition_seconds",
            "Wall time of the last one that succeeded.",
            labels=[*self._names, "operation"],
        )
        copied = GaugeMetricFamily(
            "cumempool_last_transition_copied_bytes",
            "Bytes that the last one copied.",
            labels=[*self._names, "operation"],
        )
        last = {e.operation: e for e in self._allocator.events if not e.error}
        for operation, event in last.items():
            seconds.add_metric([*self._values, operation], event.seconds)
            if event.report is not None:
                copied.add_metric([*self._values, operation], event.report.bytes_copied)
        yield seconds
        yield copied
