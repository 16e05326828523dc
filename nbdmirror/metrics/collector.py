"""DaemonCollector: what a daemon knows, as Prometheus names it.

Rules:
1. Nothing is kept here. Numbers are read where they are, when somebody asks.
2. Labels are names that an administrator has chosen, or words of the protocols; never an address, a path or an offset.
3. A job is there until it has ended; how it ended is said by events and `status`.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

from nbdmirror import __version__
from nbdmirror.jobs.status import JobStatus
from nbdmirror.protocol import constants as c
from nbdmirror.server.tally import OPERATIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from nbdmirror.inventory import Inventory
    from nbdmirror.jobs.job import Job

# What brought how much to the target, by the counters of a job's statistics. "skipped" read as zero there already.
_SENT: Final = {"data": "x-bytes-sent", "zero": "x-bytes-zeroed", "skipped": "x-bytes-skipped"}


def registry(inventory: Inventory) -> CollectorRegistry:
    """All that is exposed: the daemon's own metrics, and those of its process."""
    found = CollectorRegistry(auto_describe=False)
    found.register(DaemonCollector(inventory))
    ProcessCollector(registry=found)
    return found


class DaemonCollector:
    """Collected once a scrape."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        yield InfoMetricFamily("nbdmirror_build", "The version.", {"version": __version__})
        yield from self._of_exports()
        yield from self._of_bitmaps()
        yield from _of_jobs(list(self._inventory.jobs.values()))

    def _of_exports(self) -> Iterator[Metric]:
        labels = ["export", "id"]  # two servers may have exports of one name
        size = GaugeMetricFamily("nbdmirror_export_size_bytes", "Size of the disk.", labels=labels)
        connections = GaugeMetricFamily("nbdmirror_nbd_connections", "Clients that have it open.", labels=labels)
        in_flight = GaugeMetricFamily(
            "nbdmirror_nbd_inflight_requests", "Requests that wait for a disk just now.", labels=labels
        )
        requests = CounterMetricFamily("nbdmirror_nbd_requests", "Requests answered.", labels=[*labels, "op"])
        lengths = CounterMetricFamily(
            "nbdmirror_nbd_request_bytes", "Bytes of the requests that succeeded.", labels=[*labels, "op"]
        )
        errors = CounterMetricFamily("nbdmirror_nbd_errors", "Requests answered by an error.", labels=[*labels, "op", "errno"])
        for each in self._inventory.exports.values():
            export, tally = each.export, each.export.tally
            named = [export.name, each.id]
            size.add_metric(named, export.device.size)
            connections.add_metric(named, len(export.sessions))
            in_flight.add_metric(named, tally.in_flight)
            for op, count, length in zip(OPERATIONS, tally.requests, tally.lengths, strict=True):
                requests.add_metric([*named, op], count)
                lengths.add_metric([*named, op], length)
            for (command, error), count in tally.errors.items():
                errors.add_metric([*named, OPERATIONS[command], _error_name(error)], count)
        yield from (size, connections, in_flight, requests, lengths, errors)

    def _of_bitmaps(self) -> Iterator[Metric]:
        labels = ["node", "bitmap"]
        dirty = GaugeMetricFamily("nbdmirror_bitmap_dirty_bytes", "What a bitmap has marked.", labels=labels)
        granularity = GaugeMetricFamily("nbdmirror_bitmap_granularity_bytes", "Bytes per bit.", labels=labels)
        for node in self._inventory.nodes.values():
            for bitmap in node.bitmaps:
                dirty.add_metric([node.name, bitmap.name], bitmap.bits.dirty_bytes)
                granularity.add_metric([node.name, bitmap.name], bitmap.bits.granularity)
        yield from (dirty, granularity)


def _of_jobs(jobs: list[Job]) -> Iterator[Metric]:
    state = GaugeMetricFamily("nbdmirror_mirror_state", "1 for the state that a job is in.", labels=["job", "state"])
    ready = GaugeMetricFamily("nbdmirror_mirror_ready", "Whether the job can be completed.", labels=["job"])
    remaining = GaugeMetricFamily("nbdmirror_mirror_remaining_bytes", "What is still to be copied.", labels=["job"])
    speed = GaugeMetricFamily(
        "nbdmirror_mirror_speed_limit_bytes_per_second", "The limit that was set; 0 is none.", labels=["job"]
    )
    read = CounterMetricFamily("nbdmirror_mirror_read_bytes", "Bytes read from the source.", labels=["job"])
    sent = CounterMetricFamily("nbdmirror_mirror_sent_bytes", "Bytes brought to the target.", labels=["job", "kind"])
    for job in jobs:
        done, total = job.progress
        statistics = job.statistics()
        for each in JobStatus:
            state.add_metric([job.id, each.value], job.status is each)
        ready.add_metric([job.id], job.is_ready)
        remaining.add_metric([job.id], total - done)
        speed.add_metric([job.id], job.speed)
        read.add_metric([job.id], statistics["x-bytes-read"])
        for kind, name in _SENT.items():
            sent.add_metric([job.id, kind], statistics[name])
    yield from (state, ready, remaining, speed, read, sent)


def _error_name(error: int) -> str:
    """An NBD error; its numbers are those of Linux where it has names for them."""
    return "ESHUTDOWN" if error == c.ESHUTDOWN else errno.errorcode.get(error, str(error))
