"""The metrics of the ranks of a job: a few series of each, told by rank 0, which asks the others at each scrape.

A server alone has none of them. What a rank has never said has no series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from pushstep.proto.shards_pb2 import RankFigures

from ..reports.job_view import RankRow, RankState
from .family import Family, Kind, Reading

COUNTER, GAUGE = Kind.COUNTER, Kind.GAUGE
_HEARD: Final = (RankState.STARTING, RankState.SERVING, RankState.STOPPING)


def _said(read: Callable[[RankFigures], float]) -> Callable[[RankRow], Iterable[Reading]]:
    return lambda row: [] if row.figures is None else [((), read(row.figures))]


def _budgets(row: RankRow) -> Iterable[Reading]:
    found = row.figures
    if found is not None:
        yield ("models",), found.held_bytes
        yield ("staging",), found.staging_bytes
        yield ("reading",), found.reading_bytes


def _limits(row: RankRow) -> Iterable[Reading]:
    found = row.figures
    if found is not None:
        yield ("models",), found.held_limit_bytes
        yield ("staging",), found.staging_limit_bytes
        yield ("reading",), found.reading_limit_bytes


def _traffic(row: RankRow) -> Iterable[Reading]:
    found = row.figures
    return [] if found is None else [(("in",), found.received_bytes), (("out",), found.sent_bytes)]


def _snapshot_s(row: RankRow) -> Iterable[Reading]:
    found = row.figures
    return [] if found is None or not found.snapshot_created_s else [((), found.snapshot_created_s)]


RANK_METRICS: Final[tuple[Family[RankRow], ...]] = (
    Family(
        "pushstep_rank_link_up",
        GAUGE,
        "1 while a rank is heard of. Are all ranks of the job there?",
        lambda row: [((), row.state in _HEARD)],
    ),
    Family(
        "pushstep_rank_figures_age_seconds",
        GAUGE,
        "How old a rank's figures are, which are asked for at each scrape. Does a rank answer?",
        lambda row: [] if row.figures is None else [((), row.age_s)],
    ),
    Family(
        "pushstep_rank_behind_versions",
        GAUGE,
        "The most versions that a rank is behind the newest ticket, of any model. Which rank holds up the others?",
        lambda row: [((), row.behind)],
    ),
    Family(
        "pushstep_rank_budget_used_bytes",
        GAUGE,
        "Bytes that a rank has taken of each budget. Are the models spread evenly?",
        _budgets,
        ("budget",),
    ),
    Family(
        "pushstep_rank_budget_limit_bytes",
        GAUGE,
        "The budgets of a rank. Which rank is full first?",
        _limits,
        ("budget",),
    ),
    Family(
        "pushstep_rank_pushes_staged",
        GAUGE,
        "Pushes whose part a rank has, and which are not stepped yet. What waits for other ranks, for a round, or for the writer?",
        _said(lambda found: found.pushes_staged),
    ),
    Family(
        "pushstep_rank_steps_total",
        COUNTER,
        "Pushes that a rank has stepped its part of. Does it step?",
        _said(lambda found: found.steps),
    ),
    Family(
        "pushstep_rank_step_seconds_total",
        COUNTER,
        "Time of those steps. Which rank's steps are slow? See `rate(..._seconds_total) / rate(pushstep_rank_steps_total)`.",
        _said(lambda found: found.step_s),
    ),
    Family(
        "pushstep_rank_journal_records_total",
        COUNTER,
        "Records that a rank has appended to its journals. Is it written?",
        _said(lambda found: found.journal_records),
    ),
    Family(
        "pushstep_rank_journal_seconds_total",
        COUNTER,
        "Time to append those records. Which rank's disk is slow?",
        _said(lambda found: found.journal_s),
    ),
    Family(
        "pushstep_rank_snapshot_created_timestamp_seconds",
        GAUGE,
        "When the oldest of the newest snapshots of a rank's models was taken. Does every rank save? See `time() - ...`.",
        _snapshot_s,
    ),
    Family(
        "pushstep_rank_traffic_bytes_total",
        COUNTER,
        "Bytes that a rank's gRPC door has carried, by direction. Do some ranks get more than others?",
        _traffic,
        ("direction",),
    ),
)
