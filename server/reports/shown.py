"""The ranks of a job as JSON: how full each is, how far it has come, and which part of each model lies in it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from pushstep.proto.shards_pb2 import RankFigures, RankRates
from pushstep.proto.wire.layout import Layout

from ..arenas.arena import Arenas
from ..capacity.capacity import Carrier, carrier, own_carrier
from ..capacity.rates import Rates
from ..models.catalog import Catalog
from ..models.model import Model
from .job_view import RankRow, versions_of


def rank_shown(row: RankRow) -> dict[str, Any]:
    """A rank. What it has not said yet is null."""
    found = row.figures
    return {
        "rank": row.rank,
        "state": row.state,
        "address": row.address or None,
        "unix_path": row.unix_path or None,
        "silent_s": None if row.silent_s is None else round(row.silent_s, 1),
        "figures_age_s": None if found is None else round(row.age_s, 1),
        "versions_behind": row.behind,
        "pushes_staged": None if found is None else found.pushes_staged,
        "seconds": None
        if found is None
        else {
            "step": {"count": found.steps, "sum": found.step_s},
            "journal": {"count": found.journal_records, "sum": found.journal_s},
        },
        "traffic_bytes": None if found is None else {"in": found.received_bytes, "out": found.sent_bytes},
        "snapshot_created": (found.snapshot_created_s or None) if found is not None else None,
        **room_shown(found),
    }


def room_shown(found: RankFigures | None) -> dict[str, Any]:
    """How full a rank is, in the words of /v1/capacity."""
    if found is None:
        return dict.fromkeys(("bytes", "staging_bytes", "read_bytes", "memory_bytes", "device"))
    return {
        "bytes": {"held": found.held_bytes, "limit": found.held_limit_bytes},
        "staging_bytes": {"held": found.staging_bytes, "limit": found.staging_limit_bytes},
        "read_bytes": {"held": found.reading_bytes, "limit": found.reading_limit_bytes},
        "memory_bytes": {
            "available": found.memory_available_bytes or None,
            "total": found.memory_total_bytes or None,
        },
        "device": found.device,
    }


def skew(sizes: Sequence[float]) -> float:
    """The largest of these over their mean: 1 if all are equal."""
    mean = fmean(sizes) if sizes else 0.0
    return round(max(sizes) / mean, 4) if mean else 1.0


def parts_of(model: Model) -> dict[int, Layout]:
    """What lies in each rank of a model."""
    if model.shard is None:
        return {0: model.layout}
    return {part.rank: part.layout for part in model.shard.parts if part is not None}


def bytes_in_all(model: Model) -> int:
    """Bytes that a model takes of --max-bytes, in all ranks."""
    here = Arenas.bytes_charged(model.layout)
    return model.held_bytes + sum(map(Arenas.bytes_charged, parts_of(model).values())) - here


def model_shown(model: Model, world: int) -> dict[str, Any]:
    """A model: which part of it each rank has, at which version."""
    layouts, reached = parts_of(model), versions_of(model)
    sizes = {rank: Arenas.bytes_charged(layout) for rank, layout in layouts.items()}
    total = sum(sizes.values())
    shard = model.shard
    return {
        "name": model.name,
        "timeline": model.timeline,
        "version": model.version,
        # 64 bits: a number in JSON may lose some
        "map_version": None if shard is None else f"{shard.map.version:016x}",
        "bytes": total,
        "skew": skew([sizes.get(rank, 0) for rank in range(world)]),
        "shards": [
            {
                "rank": rank,
                "version": reached.get(rank, model.version),
                "parameters": len(layout.slots),
                "elements": sum(arena.elements for arena in layout.arenas),
                "bytes": sizes[rank],
                "share": round(sizes[rank] / total, 6) if total else 0.0,
            }
            for rank, layout in layouts.items()
        ],
    }


# Capacity.


def capacity_shown(row: RankRow, rates: Rates | None) -> dict[str, Any]:
    """How full a rank is, and its rates; null until it has measured them."""
    return {
        "rank": row.rank,
        "state": row.state,
        **room_shown(row.figures),
        "rates": None
        if rates is None
        else {
            "ingest_bytes_per_s": round(rates.ingest_bytes_per_s),
            "step_elements_per_s": {name: round(rate) for name, rate in rates.step_elements_per_s.items()},
            "age_s": round(rates.age_s, 1),
        },
    }


def rates_of(row: RankRow, own: Rates) -> Rates | None:
    """The rates of a rank's host. `own`: rank 0's."""
    if row.rank == 0:
        return own
    found = row.figures
    return _heard(found.rates, own.measured_s) if found is not None and found.HasField("rates") else None


def _heard(rates: RankRates, now_s: float) -> Rates:
    return Rates(rates.ingest_bytes_per_s, dict(rates.step_elements_per_s), now_s - rates.age_s)


def carriers(model: Model, catalog: Catalog, rows: Sequence[RankRow], own: Rates) -> list[Carrier]:
    """The ranks that have a part of a model. One that has not said its rates is taken to be as fast as rank 0."""
    found = [own_carrier(model, catalog, own)]
    by_rank = {row.rank: row for row in rows}
    for rank, layout in parts_of(model).items():
        row = by_rank.get(rank)
        if rank == 0 or row is None:
            continue
        said = row.figures
        limit_bytes = catalog.staging.total_bytes if said is None else int(said.staging_limit_bytes)
        found.append(carrier(rank, layout, limit_bytes, rates_of(row, own) or own))
    return found
