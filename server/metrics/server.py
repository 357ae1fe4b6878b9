"""The metrics of the server as a whole: its doors, its budgets, its event loop, its device and its disk."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version as installed_version
from typing import Final

from ..counters.server_counts import ServerCounts
from ..models.catalog import Catalog
from .disk import DiskWatch
from .family import Family, Kind, Reading

COUNTER, GAUGE, HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
VERSION: Final = installed_version("pushstep")


class ServerView:
    """The server during one scrape."""

    def __init__(self, catalog: Catalog, disk: DiskWatch, *, ready: bool) -> None:
        self.catalog = catalog
        self.ready = ready
        self.counts: ServerCounts = catalog.counts
        self.disk = disk


def _traffic(view: ServerView) -> Iterable[Reading]:
    counts = view.counts
    for name in ("tcp", "unix", "shared_memory", "http"):
        way = getattr(counts, name)
        yield ("in", name), way.received_bytes
        yield ("out", name), way.sent_bytes


def _budgets(view: ServerView, *, limits: bool) -> Iterable[Reading]:
    catalog = view.catalog
    config, staging, reading = catalog.config, catalog.staging, catalog.reading
    yield ("models",), config.max_bytes if limits else catalog.holding.held_bytes
    yield ("staging",), staging.total_bytes if limits else staging.used_bytes
    yield ("reading",), reading.total_bytes if limits else reading.used_bytes


def _device_memory(view: ServerView) -> Iterable[Reading]:
    return [((of,), number) for of, number in view.catalog.device.memory().items()]


def _disk(view: ServerView) -> Iterable[Reading]:
    found = view.disk.found
    return [] if found is None else [(("free",), found.free_bytes), (("total",), found.total_bytes)]


SERVER_METRICS: Final[tuple[Family[ServerView], ...]] = (
    Family(
        "pushstep_info",
        GAUGE,
        "Always 1. Which version runs, on which device?",
        lambda view: [((VERSION, str(view.catalog.device.where)), 1)],
        ("version", "device"),
    ),
    Family(
        "pushstep_ready",
        GAUGE,
        "1 while the server takes work, as /readyz says. Is it still loading models, or stopping?",
        lambda view: [((), view.ready)],
    ),
    Family(
        "pushstep_models",
        GAUGE,
        "Models held. How many are there?",
        lambda view: [((), len(view.catalog.models))],
    ),
    Family(
        "pushstep_models_limit",
        GAUGE,
        "What --max-models says. How many more may be made?",
        lambda view: [((), view.catalog.config.max_models)],
    ),
    Family(
        "pushstep_models_not_loaded",
        GAUGE,
        "Models whose files could not be loaded at the start. Does one need an operator?",
        lambda view: [((), len(view.catalog.not_loaded))],
    ),
    Family(
        "pushstep_refusals_total",
        COUNTER,
        "Answers of both doors that were errors, by code. Who is turned away, and why?",
        lambda view: [(key, number) for key, number in sorted(view.counts.refusals.copy().items())],
        ("door", "code"),
    ),
    Family(
        "pushstep_traffic_bytes_total",
        COUNTER,
        "Bytes by direction and transport, without headers of HTTP. What does the network carry?",
        _traffic,
        ("direction", "transport"),
    ),
    Family(
        "pushstep_budget_used_bytes",
        GAUGE,
        "Bytes taken of each budget. Are pushes or readers waiting for memory?",
        lambda view: _budgets(view, limits=False),
        ("budget",),
    ),
    Family(
        "pushstep_budget_limit_bytes",
        GAUGE,
        "The budgets: --max-bytes, --staging-bytes, --read-bytes. How much is there?",
        lambda view: _budgets(view, limits=True),
        ("budget",),
    ),
    Family(
        "pushstep_snapshot_saved_bytes",
        GAUGE,
        "Kept of what training has overwritten under the snapshots being written, two models at most. Does a slow disk cost memory?",
        lambda view: [((), view.catalog.snapshotter.saved_bytes)],
    ),
    Family(
        "pushstep_event_loop_lag_seconds",
        HISTOGRAM,
        "How late the event loop runs what is due. Does something hold up everybody?",
        lambda view: [((), view.counts.loop_lag)],
    ),
    Family(
        "pushstep_device_memory_bytes",
        GAUGE,
        "Memory of the device that the models lie on; none for the CPU. Is the GPU full?",
        _device_memory,
        ("of",),
    ),
    Family(
        "pushstep_disk_bytes",
        GAUGE,
        "The disk of the data folder. Is there room for snapshots and journals?",
        _disk,
        ("of",),
    ),
)
