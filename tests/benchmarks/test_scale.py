"""The model of a job of many ranks: its constants come back, its rates are those of what is saturated; and both benchmarks run."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from .printed import printed
from .scale_costs import Costs, Sample, fitted, parts_of
from .scale_model import Outcome, Setting, Simulation

TIMEOUT_S = 300  # some 100 s on a machine with a load of 10
COSTS = Costs(
    server_open_s=0.7e-3,
    server_call_s=1.7e-3,
    rank_open_s=1.1e-3,
    rank_call_s=2.7e-3,
    zero_s=0.2e-3,
    each_rank_s=0.3e-3,
    worker_s=0.1e-3,
    worker_open_s=0.5e-3,
    worker_call_s=1.4e-3,
    server_byte_s=1.1e-9,
    worker_byte_s=0.6e-9,
)
OWN = Setting(cores=2, bytes_per_s=3e9, latency_s=50e-6)
# of equal work's unequal times, in some thousand draws
NEAR = 0.05


def run(elements: int, ranks: int, workers: int, setting: Setting = OWN) -> Outcome:
    return Simulation(COSTS, parts_of(elements, ranks), workers, setting).run(4 * workers, 400)


@pytest.mark.parametrize("elements", [10_000, 1_000_000, 16_000_000])
@pytest.mark.parametrize("ranks", [1, 2, 4, 32])
def test_the_parts_are_the_whole(elements: int, ranks: int) -> None:
    assert sum(parts_of(elements, ranks)) == 4 * elements
    assert len(parts_of(elements, ranks)) == ranks


def test_what_rank_0_has_beside_its_part() -> None:
    assert COSTS.of_rank(0, [40_000]) == pytest.approx(0.7e-3 + 40_000 * 1.1e-9)
    # of its 4 ranks one has no part
    assert COSTS.of_rank(0, [1_000_000, 60_000, 0, 7]) == pytest.approx(2.7e-3 + 1.1e-3 + 0.2e-3 + 2 * 0.3e-3)
    assert COSTS.of_rank(1, [1_000_000, 60_000, 0, 7]) == pytest.approx(1.1e-3 + 60_000 * 1.1e-9)


def test_constants_come_back_from_what_they_make() -> None:
    samples = []
    for elements in (10_000, 100_000, 1_000_000, 16_000_000):
        for ranks in (1, 2, 4):
            parts = parts_of(elements, ranks)
            rank_s = [COSTS.of_rank(rank, parts) for rank in range(ranks)]
            worker_s = COSTS.worker_s + sum(COSTS.worker_of(part) for part in parts if part)
            worker_s += sum(parts) * COSTS.worker_byte_s
            samples.append(Sample(elements, ranks, 4, 100.0, worker_s, rank_s, 0.0))
    found, misses = fitted(samples)
    assert asdict(found) == pytest.approx(asdict(COSTS), rel=1e-6)
    assert misses == pytest.approx([0.0] * len(misses), abs=1e-9)


@pytest.mark.parametrize(
    ("elements", "ranks", "rate", "saturated"),
    [
        # a push's share of what is busy all the time
        (10_000, 1, 1 / 0.7e-3, "rank 0's interpreter"),
        (10_000, 2, 1 / (1.1e-3 + 0.2e-3 + 0.3e-3), "rank 0's interpreter"),
        (16_000_000, 1, 2 / (1.7e-3 + 64e6 * 1.1e-9), "rank 0's cores"),
        (16_000_000, 32, 1 / (2.7e-3 + 0.2e-3 + 31 * 0.3e-3), "rank 0's interpreter"),
    ],
)
def test_the_rate_is_that_of_what_is_saturated(
    elements: int, ranks: int, rate: float, saturated: str
) -> None:
    outcome = run(elements, ranks, 32)
    assert outcome.saturated == saturated
    assert outcome.rate == pytest.approx(rate, rel=NEAR)


def test_a_slow_link_is_what_bounds() -> None:
    outcome = run(16_000_000, 4, 32, replace(OWN, bytes_per_s=125e6))
    assert "link" in outcome.saturated
    assert outcome.rate == pytest.approx(125e6 / 16e6, rel=NEAR)


def test_one_machine_does_all_with_its_cores() -> None:
    here = replace(OWN, is_one_machine=True, bytes_per_s=float("inf"), worker_processes=2)
    outcome = run(1_000_000, 2, 8, here)
    each_s = 2 * (2.7e-3 + 1.4e-3) + 0.2e-3 + 0.3e-3 + 0.1e-3 + 4e6 * (1.1e-9 + 0.6e-9)
    assert outcome.saturated == "the machine's cores"
    assert outcome.rate == pytest.approx(2 / each_s, rel=NEAR)
    half = run(1_000_000, 2, 8, replace(here, others_share=0.5))
    assert half.rate == pytest.approx(outcome.rate / 2, rel=NEAR)


def test_one_slow_rank_holds_up_all() -> None:
    found = run(16_000_000, 4, 32), run(16_000_000, 4, 32, replace(OWN, has_slow_rank=True))
    assert found[1].saturated == "a rank's cores"
    assert found[1].rate < found[0].rate * 0.7


@pytest.mark.timeout(TIMEOUT_S + 20)
@pytest.mark.soak
def test_the_model_is_measured_checked_and_printed() -> None:
    found = list(printed(TIMEOUT_S, "scale").values())
    costs, check, *scales, circumstances = found
    assert len(costs) == 11
    assert [row[:3] for row in check[:3]] == [["10 K", "1", "1"], ["10 K", "2", "1"], ["10 K", "4", "1"]]
    assert all(float(row[3]) > 0 and float(row[4]) > 0 for row in check)
    assert [[row[0] for row in scale] for scale in scales] == [["1", "2", "4", "8"]] * 2
    assert len(circumstances) == 6


@pytest.mark.timeout(TIMEOUT_S + 20)
@pytest.mark.soak
def test_ranks_stand_beside_as_many_servers_of_rpc() -> None:
    sides = ["", ", 2 ranks", ", 4 ranks"], ["", ", 2 servers", ", 4 servers"]
    names = [f"pushstep tcp float32{ranks}" for ranks in sides[0]] + [
        f"rpc uv{servers}" for servers in sides[1]
    ]
    found = printed(TIMEOUT_S, "shards")
    assert len(found) == 4
    for rows in found.values():
        assert [row[0] for row in rows] == names
        assert all(0 < float(row[1]) <= float(row[2]) for row in rows)
        assert all(float(row[-1]) > 0 and float(row[-2]) > 0 for row in rows[:3])
