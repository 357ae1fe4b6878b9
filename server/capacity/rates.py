"""Rates of this host, measured now and then on memory of their own, in a thread: no model and no writer is touched."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from pushstep.optim import RULES
from pushstep.optim.ops.norms import square_sum
from pushstep.proto.wire.frames import Assembly, BodyDigest, Chunk

from ..process.threads import READS

# Large enough to be beyond most caches, small enough to take some ten milliseconds.
MEASURED_BYTES: Final = 16 << 20
CHUNK_BYTES: Final = 1 << 20
FLAT: Final = partial(torch.zeros, dtype=torch.float32, device="cpu")
# The best of so many: others on the host make a run slower, never faster.
RUNS: Final = 3
KEPT_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Rates:
    """What one core of this process takes in, and what its kernels step, in a second."""

    # of a push's body: put in its place, its digest, its norms
    ingest_bytes_per_s: float
    # of float32 parameters, by rule
    step_elements_per_s: Mapping[str, float]
    measured_s: float

    @property
    def age_s(self) -> float:
        """How long ago they were measured."""
        return time.monotonic() - self.measured_s


class Measured:
    """The last measurement. A new one is made when somebody asks and the last is older than KEPT_S."""

    def __init__(self) -> None:
        self._rates: asyncio.Future[Rates] | None = None
        self._until_s = 0.0

    async def rates(self) -> Rates:
        """The rates; all who ask at once share one measurement. Busy if readers take all threads."""
        if self._rates is None or (self._rates.done() and time.monotonic() > self._until_s):
            self._rates = asyncio.ensure_future(READS.run(measure))
            self._until_s = time.monotonic() + KEPT_S
            self._rates.add_done_callback(self._forget_failure)
        return await asyncio.shield(self._rates)

    def _forget_failure(self, done: asyncio.Future[Rates]) -> None:
        if done.cancelled() or done.exception() is not None:
            self._rates = None


def measure() -> Rates:
    """Measure. It blocks for some tenths of a second."""
    steps = {name: MEASURED_BYTES / 4 / _best(_step_of(name)) for name in RULES}
    return Rates(MEASURED_BYTES / _best(_ingest()), steps, time.monotonic())


def _best(run: Callable[[], None]) -> float:
    run()  # compiles what is not compiled yet, and touches the memory
    found = []
    for _ in range(RUNS):
        begun_s = time.perf_counter()
        run()
        found.append(time.perf_counter() - begun_s)
    return max(min(found), 1e-9)


def _ingest() -> Callable[[], None]:
    chunk = memoryview(bytes(CHUNK_BYTES))

    def run() -> None:
        body = Assembly([MEASURED_BYTES], BodyDigest(()))
        for start in range(0, MEASURED_BYTES, CHUNK_BYTES):
            body.place(Chunk(0, start, chunk))
        square_sum(body.part(0, torch.float32))

    return run


def _step_of(name: str) -> Callable[[], None]:
    rule = RULES[name]
    elements = MEASURED_BYTES // 4
    param, gradient = FLAT(elements), FLAT(elements).fill_(1e-3)
    states = [FLAT(elements) for _ in rule.state_names]

    def run() -> None:
        rule.step_dense(param, gradient, states, dict(rule.defaults), step=1)

    return run
