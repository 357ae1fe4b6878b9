"""What a rank says of itself when it is asked: plain numbers that are counted anyway, added up over its models."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pushstep.proto.shards_pb2 import RankFigures, RankRates

from ..capacity.host import host_memory
from ..capacity.rates import Measured, Rates
from ..models.catalog import Catalog
from ..models.model import Model


@dataclass(slots=True)
class _Counted:
    """What counts up only: it may not go back when a model is deleted."""

    steps: int = 0
    step_s: float = 0.0
    journal_records: int = 0
    journal_s: float = 0.0

    def add(self, other: _Counted) -> None:
        """Add another one's numbers."""
        self.steps += other.steps
        self.step_s += other.step_s
        self.journal_records += other.journal_records
        self.journal_s += other.journal_s


class Reporter:
    """One rank's. Used on the event loop only."""

    def __init__(self, catalog: Catalog, staged: Callable[[], int]) -> None:
        """`staged`: how many pushes have their part here, and no step yet."""
        self._catalog = catalog
        self._staged = staged
        self.measured = Measured()
        # by uid, as last seen; and of those that are deleted
        self._seen: dict[bytes, _Counted] = {}
        self._gone = _Counted()

    def figures(self) -> RankFigures:
        """What is counted now."""
        catalog, memory = self._catalog, host_memory()
        models = list(catalog.models.values())
        counted, counts = self._counted(models), catalog.counts
        return RankFigures(
            held_bytes=catalog.holding.held_bytes,
            held_limit_bytes=catalog.config.max_bytes,
            staging_bytes=catalog.staging.used_bytes,
            staging_limit_bytes=catalog.staging.total_bytes,
            reading_bytes=catalog.reading.used_bytes,
            reading_limit_bytes=catalog.reading.total_bytes,
            memory_available_bytes=memory.get("MemAvailable", 0),
            memory_total_bytes=memory.get("MemTotal", 0),
            pushes_staged=self._staged(),
            steps=counted.steps,
            step_s=counted.step_s,
            journal_records=counted.journal_records,
            journal_s=counted.journal_s,
            snapshot_created_s=min((model.counts.snapshots.created_s for model in models), default=0.0),
            received_bytes=counts.tcp.received_bytes + counts.unix.received_bytes,
            sent_bytes=counts.tcp.sent_bytes + counts.unix.sent_bytes,
            device=str(catalog.device.where),
        )

    async def with_rates(self) -> RankFigures:
        """The same, and this host's rates. Busy if readers take all threads."""
        rates = await self.measured.rates()
        found = self.figures()
        found.rates.CopyFrom(said(rates))
        return found

    def _counted(self, models: Iterable[Model]) -> _Counted:
        now = {model.uid: _counted_of(model) for model in models}
        for uid in self._seen.keys() - now.keys():
            self._gone.add(self._seen[uid])
        self._seen = now
        total = _Counted()
        for each in (self._gone, *now.values()):
            total.add(each)
        return total


def _counted_of(model: Model) -> _Counted:
    step, journal = model.counts.step, model.counts.journal
    return _Counted(step.count, step.sum, journal.records, journal.append.sum)


def said(rates: Rates) -> RankRates:
    """Rates as a message."""
    return RankRates(
        ingest_bytes_per_s=rates.ingest_bytes_per_s,
        step_elements_per_s=rates.step_elements_per_s,
        age_s=rates.age_s,
    )
