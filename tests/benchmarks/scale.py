"""How far a job of many ranks and workers goes: a model of it, with costs that are measured on this machine first.

Measured: CPU time of each rank and of the workers for pushes of several sizes to 1, 2 and 4 real ranks, over TCP
(`scale_costs.py`). Modelled (`scale_model.py`): workers that push without rest, by Adadelta and as they come (`async`); the cut that
servers and workers make; parts in messages of 2 MiB, one after another; what rank 0 hears of each part and of each step, and the ticket
that it sends each rank; a receipt once every rank has stepped. Each process has one interpreter, in which all fixed costs
fall, and as many cores as this machine has, on which the costs of bytes fall, too. Each rank and each worker has a machine
and a link of its own; equal work takes unequal times (a spread of 0.3), and one worker in 16 is 4 times as slow.

Not modelled: exchanges and pulls, rounds (`sync`), journals and snapshots, more cores than this machine has, memory's bandwidth,
loss and congestion of the network, a switch that is not as fast as all links together, threads that wake late, budgets that
refuse, and whatever gets cheaper or dearer by piece when there is more of it: all costs are those of 1 and 4 workers. What a further rank costs
rank 0 is measured with 1 to 3 further ranks and taken to be as much for each of 31.

The check has the model predict the rates that were measured, and runs of 8 ranks, which the constants are not made of: all
processes on one machine, which strangers make slower by their share. Take it on a quiet one. On another, workers that leave
cores idle are faster than that says, since strangers use what is idle, too.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from .scale_costs import DRIVERS, Costs, Sample, fitted, milliseconds, parts_of, sampled
from .scale_model import Outcome, Setting, Simulation
from .table import count, table

SIZES: Final = (10_000, 1_000_000, 16_000_000)
# between 10 K, whose parts go over an open call, and 1 M, the parts of 1 M in many ranks
MEASURED_SIZES: Final = (10_000, 100_000, 1_000_000, 16_000_000)
MEASURED_RANKS: Final = (1, 2, 4)
MEASURED_WORKERS: Final = (1, 4)
# what the constants are not made of, and have to predict as well
BEYOND_SIZES: Final = (100_000, 1_000_000)
BEYOND_RANKS: Final = (8,)
BEYOND_WORKERS: Final = (4,)
RANKS: Final = (1, 2, 4, 8, 16, 32)
WORKERS: Final = (1, 8, 64, 256, 512)
QUICK_SIZES: Final = (10_000, 100_000)
QUICK_RANKS: Final = (1, 2, 4, 8)
QUICK_WORKERS: Final = (1, 8)
GBIT_BYTES: Final = 125e6
LATENCY_S: Final = 50e-6
OWN_MACHINES: Final = Setting(
    cores=os.cpu_count() or 1, bytes_per_s=25 * GBIT_BYTES, latency_s=LATENCY_S, slow_workers=16
)
CIRCUMSTANCES: Final = {
    "as above": OWN_MACHINES,
    "no worker is slow": replace(OWN_MACHINES, slow_workers=0),
    "the last rank is half as fast": replace(OWN_MACHINES, has_slow_rank=True),
    "links of 10 Gbit/s": replace(OWN_MACHINES, bytes_per_s=10 * GBIT_BYTES),
    "links of 1 Gbit/s": replace(OWN_MACHINES, bytes_per_s=GBIT_BYTES),
    "2 ms of latency": replace(OWN_MACHINES, latency_s=2e-3),
}
# of the measured rate, at most and, as its reciprocal, at least
NEAR: Final = 1.5


def main(quick: bool) -> None:
    """Measure, check the model, and print what it says."""
    samples = sampled(QUICK_SIZES if quick else MEASURED_SIZES, MEASURED_RANKS, MEASURED_WORKERS, quick)
    costs, misses = fitted(samples)
    _print_costs(costs, misses, samples)
    beyond = [] if quick else sampled(BEYOND_SIZES, BEYOND_RANKS, BEYOND_WORKERS, quick)
    _print_check(costs, [*samples, *beyond])
    ranks, workers = (QUICK_RANKS, QUICK_WORKERS) if quick else (RANKS, WORKERS)
    sizes = QUICK_SIZES if quick else SIZES
    for elements in sizes:
        _print_scale(costs, elements, ranks, workers)
    _print_circumstances(costs, sizes[-1], ranks, 8 if quick else 64)


def _outcome(costs: Costs, elements: int, ranks: int, workers: int, setting: Setting) -> Outcome:
    # All begin at once and so go in waves: from the end of a wave to the end of another.
    pushes = workers * max(3, 64 // workers)
    return Simulation(costs, parts_of(elements, ranks), workers, setting).run(workers, pushes)


def _print_costs(costs: Costs, misses: Sequence[float], samples: Sequence[Sample]) -> None:
    words = {
        "server_open_s": "a server alone, a push up to 64 KiB",
        "server_call_s": "a server alone, a larger push",
        "rank_open_s": "a rank, a part up to 64 KiB",
        "rank_call_s": "a rank, a larger part",
        "zero_s": "rank 0, a push, beside its part",
        "each_rank_s": "rank 0, a push, for each other rank",
        "worker_s": "a worker, a push",
        "worker_open_s": "a worker, a part up to 64 KiB",
        "worker_call_s": "a worker, a larger part",
        "server_byte_s": "a server or rank, a MB",
        "worker_byte_s": "a worker, a MB",
    }
    found = milliseconds(costs)
    table(
        "What pushes cost, Adadelta over TCP",
        ("", "CPU ms"),
        [(word, f"{found[name]:.3f}") for name, word in words.items()],
        _others(samples),
    )
    sizes = sorted(map(abs, misses))
    print(
        f"Of {len(sizes)} measured costs of a push these make half to within {statistics.median(sizes):.0%}, "
        f"nine in ten to within {sizes[len(sizes) * 9 // 10]:.0%}."
    )


def _others(samples: Sequence[Sample]) -> float:
    return statistics.mean(sample.others_share for sample in samples)


def _print_check(costs: Costs, samples: Sequence[Sample]) -> None:
    rows, ratios = [], []
    for sample in samples:
        here = Setting(
            cores=os.cpu_count() or 1,
            bytes_per_s=float("inf"),
            latency_s=LATENCY_S,
            is_one_machine=True,
            others_share=min(0.95, sample.others_share),
            worker_processes=DRIVERS,
        )
        outcome = _outcome(costs, sample.elements, sample.ranks, sample.workers, here)
        ratios.append(outcome.rate / sample.rate)
        rows.append(
            (
                count(sample.elements),
                sample.ranks,
                sample.workers,
                f"{sample.rate:.1f}",
                f"{outcome.rate:.1f}",
                f"{ratios[-1]:.2f}",
                f"{sample.rank_s[0] * 1e3:.2f}",
                f"{costs.of_rank(0, parts_of(sample.elements, sample.ranks)) * 1e3:.2f}",
                f"{sample.others_share:.0%}",
                outcome.saturated,
            )
        )
    table(
        "The model beside real runs, all on this machine's cores",
        (
            *("float32", "ranks", "workers", "pushes/s", "the model's", "of those measured"),
            *("rank 0's CPU ms", "the constants'", "others had", "the model's bound"),
        ),
        rows,
        _others(samples),
    )
    near = sum(1 / NEAR <= ratio <= NEAR for ratio in ratios)
    print(
        f"Check: the model's rates are {min(ratios):.2f} to {max(ratios):.2f} times those measured, "
        f"{statistics.median(ratios):.2f} in the middle; {near} of {len(ratios)} within a factor of {NEAR:g}.",
        flush=True,
    )


def _print_scale(costs: Costs, elements: int, ranks: Sequence[int], workers: Sequence[int]) -> None:
    rows = []
    for number in ranks:
        outcomes = {n: _outcome(costs, elements, number, n, OWN_MACHINES) for n in workers}
        rows.append(
            (
                number,
                *(_rate(outcome) for outcome in outcomes.values()),
                _first_saturated(outcomes),
                *_why(costs, parts_of(elements, number)),
            )
        )
    table(
        f"The model: pushes of {count(elements)} float32 per second, by ranks and workers",
        (
            *(
                "ranks",
                *(f"{n} workers" if n > 1 else "1 worker" for n in workers),
                "saturated first, at how many workers",
            ),
            *("rank 0's interpreter ms", "for other ranks", "a rank's interpreter ms"),
            *("bytes ms of cores", "link ms"),
        ),
        rows,
    )


def _rate(outcome: Outcome) -> str:
    return f"{outcome.rate:.0f}" if outcome.rate >= 10 else f"{outcome.rate:.1f}"


def _first_saturated(outcomes: Mapping[int, Outcome]) -> str:
    """What is busy all the time first, and with how many workers."""
    found = [(n, outcome.saturated) for n, outcome in outcomes.items() if outcome.saturated]
    return f"{found[0][1]}, at {found[0][0]}" if found else "nothing"


def _why(costs: Costs, parts: Sequence[int]) -> tuple[str, ...]:
    """What a push takes of rank 0's interpreter and, of that, for other ranks; of another's; of a rank's cores and link for bytes."""
    is_alone, most = len(parts) == 1, max(parts)
    for_others_s = costs.coordination(parts)
    zero_s = costs.server_of(parts[0], is_alone=is_alone) + for_others_s
    return (
        f"{zero_s * 1e3:.2f}",
        f"{for_others_s * 1e3:.2f}",
        "" if is_alone else f"{costs.server_of(most, is_alone=False) * 1e3:.2f}",
        f"{most * costs.server_byte_s * 1e3:.2f}",
        f"{most / OWN_MACHINES.bytes_per_s * 1e3:.2f}",
    )


def _print_circumstances(costs: Costs, elements: int, ranks: Sequence[int], workers: int) -> None:
    rows = []
    for words, setting in CIRCUMSTANCES.items():
        outcomes = [_outcome(costs, elements, number, workers, setting) for number in ranks]
        cells = [f"{_rate(outcome)}, {outcome.saturated or 'nothing'}" for outcome in outcomes]
        rows.append((words, *cells))
    table(
        f"The model: pushes of {count(elements)} float32 per second of {workers} workers, and what is saturated",
        ("", *(f"{number} ranks" if number > 1 else "1 rank" for number in ranks)),
        rows,
    )
