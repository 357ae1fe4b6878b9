"""The leases of one model's live workers: which ends first, however many there are."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

from .worker import Worker, WorkerState


class Leases:
    """A heap of live workers by a time before which their lease cannot have run out."""

    def __init__(self, workers: Mapping[str, Worker]) -> None:
        self._workers = workers
        self._heap: list[tuple[float, str]] = []

    @property
    def end_after_s(self) -> float:
        """A time before which no lease of a live worker runs out; infinite without one."""
        return self._heap[0][0] if self._heap else math.inf

    def watch(self, worker: Worker) -> None:
        """Put a live worker on the heap, or else its lease never ends."""
        worker.watched_s = worker.lease_until_s
        heapq.heappush(self._heap, (worker.watched_s, worker.name))

    def first(self) -> Worker | None:
        """The live worker whose lease ends first. Each is visited about once per lease."""
        heap = self._heap
        while heap:
            due_s, name = heap[0]
            worker = self._workers.get(name)
            if worker is None or worker.state is not WorkerState.LIVE or worker.watched_s != due_s:
                heapq.heappop(heap)
            elif worker.lease_until_s > due_s:
                worker.watched_s = worker.lease_until_s
                heapq.heapreplace(heap, (worker.watched_s, name))
            else:
                return worker
        return None

    def first_s(self) -> float | None:
        """When the first lease of a live worker runs out if nothing renews it. None without a live worker."""
        first = self.first()
        return None if first is None else first.lease_until_s
