"""The text of /metrics: all metrics, read and written in a thread, in one of Prometheus's two formats.

A scrape takes no lock of a model and gives its writer no work. It is Python in a thread of its own, so pushes take turns with
it (`process/threads.py` says for how long at most).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_open_metrics

from ..models.catalog import Catalog
from ..process.threads import METRICS
from ..reports.job_view import JobView, RankRow, RankState
from .disk import DiskWatch
from .models import MODEL_METRICS, views
from .ranks import RANK_METRICS
from .server import SERVER_METRICS, ServerView

OPEN_METRICS_ACCEPTED: Final = "application/openmetrics-text"
OPEN_METRICS: Final = f"{OPEN_METRICS_ACCEPTED}; version=1.0.0; charset=utf-8"
PLAIN: Final = CONTENT_TYPE_PLAIN_0_0_4
# How long a scrape waits for the disk to say how full it is.
DISK_S: Final = 0.25


class Collector:
    """All metrics of a server, for prometheus-client."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        # of a job of several, as they were seen last
        self.ranks: Sequence[RankRow] = ()
        self._disk = DiskWatch(catalog.config.data)
        self._process = ProcessCollector(registry=None)

    def collect(self) -> Iterator[Metric]:
        """Every metric, one after the other."""
        self._disk.ask(DISK_S)
        ready = self.catalog.ready and all(row.state is RankState.SERVING for row in self.ranks)
        whole = [((), ServerView(self.catalog, self._disk, ready=ready))]
        for of_server in SERVER_METRICS:
            yield of_server.of(whole, ())
        models = views(self.catalog.models.copy())
        for of_model in MODEL_METRICS:
            yield of_model.of(models, ("model",))
        ranks = [((str(row.rank),), row) for row in self.ranks]
        for of_rank in RANK_METRICS if ranks else ():
            yield of_rank.of(ranks, ("rank",))
        yield from self._process.collect()


class Exposition:
    """Answers scrapes."""

    def __init__(self, catalog: Catalog, view: JobView) -> None:
        self._collector = Collector(catalog)
        self._view = view

    async def text(self, accept: str) -> tuple[bytes, str]:
        """The metrics, and the type of that text. Busy while too many scrapes wait. `accept`: the header of the request."""
        open_metrics = accepts_open_metrics(accept)
        if self._view.world > 1:
            self._collector.ranks = await self._view.look()
        text = await METRICS.run(self._text, open_metrics=open_metrics)
        return text, OPEN_METRICS if open_metrics else PLAIN

    def _text(self, *, open_metrics: bool) -> bytes:
        write: Callable[[Collector], bytes] = generate_open_metrics if open_metrics else generate_latest
        return write(self._collector)


def accepts_open_metrics(accept: str) -> bool:
    """True if a request's Accept header has the type of OpenMetrics, which Prometheus prefers."""
    for each in accept.split(","):
        kind, *parameters = [part.strip().lower() for part in each.split(";")]
        if kind == OPEN_METRICS_ACCEPTED:
            return "q=0" not in parameters
    return False
