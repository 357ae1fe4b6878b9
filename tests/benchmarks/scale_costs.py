"""What a push costs the processes of a job, in CPU time, measured on this machine and brought down to a few constants.

Real ranks and real workers: CPU time of each server and of the workers, for each push. The constants are those of a sum that
comes nearest to all of it (least squares of relative errors, none below 0).
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Final

import numpy as np

from pushstep.client.transport.streams import SMALL_BYTES
from pushstep.proto.types_pb2 import DType, Manifest, Parameter, ParamGroup
from pushstep.proto.wire.layout import Layout
from pushstep.proto.wire.shards import cut

from .machine import Others, cpu_s
from .pushstep_side import Case, Pushstep
from .rounds import PAUSE_S
from .side import Side

RULE: Final = "adadelta"
FLOAT32_BYTES: Final = 4
# of workers, as few as a machine of 2 cores holds
DRIVERS: Final = 2


@dataclass(frozen=True, slots=True)
class Sample:
    """What was measured: pushes per second, and CPU seconds for each push, of all workers and of each rank."""

    elements: int
    ranks: int
    workers: int
    rate: float
    worker_s: float
    rank_s: Sequence[float]
    others_share: float


@dataclass(frozen=True, slots=True)
class Costs:
    """CPU seconds. A part of at most 64 KiB goes over a call that is open, a larger one over a call of its own."""

    # a server alone, for each push
    server_open_s: float
    server_call_s: float
    # a rank, for each part; rank 0 for each push beside that, and for each other rank that has a part of the push
    rank_open_s: float
    rank_call_s: float
    zero_s: float
    each_rank_s: float
    # a worker for each push, and for each part
    worker_s: float
    worker_open_s: float
    worker_call_s: float
    # each byte, at either end
    server_byte_s: float
    worker_byte_s: float

    def server_of(self, part_bytes: int, *, is_alone: bool) -> float:
        """A rank's fixed cost of a part."""
        if is_alone:
            return self.server_open_s if part_bytes <= SMALL_BYTES else self.server_call_s
        return self.rank_open_s if part_bytes <= SMALL_BYTES else self.rank_call_s

    def coordination(self, parts: Sequence[int]) -> float:
        """What a push costs rank 0 beside its part."""
        return 0.0 if len(parts) == 1 else self.zero_s + (sum(map(bool, parts)) - 1) * self.each_rank_s

    def of_rank(self, rank: int, parts: Sequence[int]) -> float:
        """All that a push costs a rank."""
        fixed_s = self.server_of(parts[rank], is_alone=len(parts) == 1)
        return fixed_s + parts[rank] * self.server_byte_s + (self.coordination(parts) if rank == 0 else 0.0)

    def worker_of(self, part_bytes: int) -> float:
        """A worker's fixed cost of a part."""
        return self.worker_open_s if part_bytes <= SMALL_BYTES else self.worker_call_s


def parts_of(elements: int, ranks: int) -> list[int]:
    """The bytes of one parameter that each rank holds, by the cut that servers and workers make."""
    weight = Parameter(name="weight", shape=[elements], dtype=DType.DTYPE_FLOAT32)
    parts = cut(Layout(Manifest(parameters=[weight], groups=[ParamGroup(rule=RULE)])), ranks)
    return [
        0 if part is None else FLOAT32_BYTES * sum(piece.stop - piece.start for piece in part.pieces)
        for part in parts
    ]


def sampled(sizes: Sequence[int], ranks: Sequence[int], workers: Sequence[int], quick: bool) -> list[Sample]:
    """Measure pushes of every size by so many workers to so many ranks; of one size in turns."""
    rounds, seconds = (2, 0.2) if quick else (5, 1.0)
    found = []
    with contextlib.ExitStack() as stack:
        # each rank has a part, also of the small models
        servers = [Pushstep(DRIVERS, ranks=number, part_bytes=0) for number in ranks]
        for server in servers:
            stack.callback(server.close)
        for elements in sizes:
            for count in workers:
                sides = [server.side(Case("tcp"), RULE, elements, count) for server in servers]
                turns = _turns(sides, rounds, seconds)
                for side in sides:
                    side.close()
                found += [
                    Sample(elements, number, count, *turns[side.name])
                    for number, side in zip(ranks, sides, strict=True)
                ]
    return found


def _turns(
    sides: Sequence[Side], rounds: int, seconds: float
) -> dict[str, tuple[float, float, list[float], float]]:
    """Of each side the rate, the workers' and each rank's CPU seconds for a push, and what share others had meanwhile."""
    rates: dict[str, list[float]] = {side.name: [] for side in sides}
    used_s: dict[str, list[list[float]]] = {side.name: [] for side in sides}
    for side in sides:
        side.turn("push", 0, 2)
    shares: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            time.sleep(PAUSE_S)
            others = Others()
            pids = [*side.servers, *(driver.pid for driver, _ in side.crews)]
            before_s = [cpu_s(pid) for pid in pids]
            turn = side.turn("push", 0, 1, seconds)
            shares[side.name].append(others.share())
            spent_s = [cpu_s(pid) - before for pid, before in zip(pids, before_s, strict=True)]
            servers = len(side.servers)
            used = [*spent_s[:servers], sum(spent_s[servers:])]
            used_s[side.name].append([each / turn.count for each in used])
            rates[side.name].append(turn.count / turn.wall_s)
    found = {}
    for name, rows in used_s.items():
        *ranks, worker = (statistics.median(column) for column in zip(*rows, strict=True))
        found[name] = statistics.median(rates[name]), worker, ranks, statistics.median(shares[name])
    return found


def fitted(samples: Sequence[Sample]) -> tuple[Costs, list[float]]:
    """The constants, and by how much the sums that they make miss what was measured: 0.1 is a tenth."""
    servers, workers = [], []
    for sample in samples:
        parts = parts_of(sample.elements, sample.ranks)
        workers.append((_worker_terms(parts), sample.worker_s))
        for rank, used_s in enumerate(sample.rank_s):
            if parts[rank]:
                servers.append((_server_terms(rank, parts), used_s))
    found, server_misses = _least_squares(servers)
    of_worker, worker_misses = _least_squares(workers)
    constants = {field.name: 0.0 for field in fields(Costs)} | found | of_worker
    return Costs(**constants), server_misses + worker_misses


def _server_terms(rank: int, parts: Sequence[int]) -> dict[str, float]:
    kind = "open" if parts[rank] <= SMALL_BYTES else "call"
    terms = {f"{'server' if len(parts) == 1 else 'rank'}_{kind}_s": 1.0, "server_byte_s": float(parts[rank])}
    if rank == 0 and len(parts) > 1:
        terms |= {"zero_s": 1.0, "each_rank_s": float(sum(map(bool, parts)) - 1)}
    return terms


def _worker_terms(parts: Sequence[int]) -> dict[str, float]:
    opened = sum(0 < part <= SMALL_BYTES for part in parts)
    called = sum(part > SMALL_BYTES for part in parts)
    return {
        "worker_s": 1.0,
        "worker_open_s": float(opened),
        "worker_call_s": float(called),
        "worker_byte_s": float(sum(parts)),
    }


def _least_squares(
    rows: Sequence[tuple[Mapping[str, float], float]],
) -> tuple[dict[str, float], list[float]]:
    names = sorted({name for terms, _ in rows for name in terms})
    while True:
        # each row over what was measured, so that all sizes count alike; bytes in MB, so that no column is tiny
        scale = np.array([1e6 if name.endswith("byte_s") else 1.0 for name in names])
        made = np.array([[terms.get(name, 0.0) / used_s for name in names] for terms, used_s in rows]) / scale
        solved = np.linalg.lstsq(made, np.ones(len(rows)), rcond=None)[0]
        if solved.min() >= 0:
            break
        names.pop(int(solved.argmin()))
    misses = [float(miss) for miss in made @ solved - 1]
    return dict(zip(names, map(float, solved / scale), strict=True)), misses


def milliseconds(costs: Costs) -> dict[str, float]:
    """The constants in ms, of bytes for each MB."""
    return {name: value * (1e9 if name.endswith("byte_s") else 1e3) for name, value in asdict(costs).items()}
