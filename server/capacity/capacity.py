"""How full a server is, and how many workers of a model it carries.

The bounds of a model are each a number of workers; the lowest is what the server carries. A push is `push_bytes` long (every
parameter, in its own dtype), and each worker sends one in `push_every_s`:

    rate     push_every_s / max(push_bytes / ingest_bytes_per_s, step_s): a push is taken in while another one is stepped
    staging  limit / (push_bytes and what is on its way while it is read): so many pushes may be under way at once
    table    the workers that the server remembers: --max-workers, and --worker-bytes with a worker's row and receipts

`step_s` is of the model's last step; before its first it is elements / step_elements_per_s, by rule.

Of a model that lies in several ranks each rank takes its part of every push, at the same time as the others: each has a `Carrier`, and the
lowest of their bounds counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pushstep.proto.wire.layout import Layout

from ..arenas.rules import rule_of
from ..coordinator.sessions import RECEIPT_BYTES, WORKER_BYTES
from ..coordinator.worker import RECEIPTS_KEPT
from ..models.catalog import Catalog
from ..models.model import Model
from ..staging.budget import charge
from .host import host_memory
from .rates import Rates


@dataclass(frozen=True, slots=True)
class Carrier:
    """One rank, as far as it bounds the workers of a model."""

    rank: int
    # of its part of a push
    push_bytes: int
    staging_limit_bytes: int
    ingest_s: float
    step_s: float

    @property
    def push_s(self) -> float:
        """Seconds that a push takes: it is taken in while another one is stepped."""
        return max(self.ingest_s, self.step_s, 1e-9)

    @property
    def most_staged(self) -> int:
        """Pushes that may be under way at once."""
        return self.staging_limit_bytes // max(1, charge(self.push_bytes))


def usage(catalog: Catalog) -> dict[str, Any]:
    """The limits of the server, and how much of them is in use."""
    config, memory = catalog.config, host_memory()
    return {
        "models": {
            "held": len(catalog.models),
            "limit": config.max_models,
            "not_loaded": len(catalog.not_loaded),
        },
        "bytes": {"held": catalog.holding.held_bytes, "limit": config.max_bytes},
        "staging_bytes": {"held": catalog.staging.used_bytes, "limit": catalog.staging.total_bytes},
        "read_bytes": {"held": catalog.reading.used_bytes, "limit": catalog.reading.total_bytes},
        "memory_bytes": {"available": memory.get("MemAvailable"), "total": memory.get("MemTotal")},
        "device": str(catalog.device.where),
    }


def shown(rates: Rates, catalog: Catalog) -> dict[str, Any]:
    """The rates, as JSON. That of snapshots is of the last one taken; None before the first."""
    return {
        "ingest_bytes_per_s": round(rates.ingest_bytes_per_s),
        "step_elements_per_s": {name: round(rate) for name, rate in rates.step_elements_per_s.items()},
        "snapshot_bytes_per_s": catalog.snapshotter.bytes_per_s,
        "age_s": round(rates.age_s, 1),
    }


def own_carrier(model: Model, catalog: Catalog, rates: Rates) -> Carrier:
    """This process, with what it has of a model."""
    return carrier(0, model.layout, catalog.staging.total_bytes, rates, _last_step_s(model))


def carrier(
    rank: int, layout: Layout, staging_limit_bytes: int, rates: Rates, step_s: float | None = None
) -> Carrier:
    """A rank with what it has of a model. `step_s`: of its last step; None: as the rates say."""
    push_bytes = sum(arena.elements * arena.dtype.itemsize for arena in layout.arenas)
    step_s = _step_s(layout, rates) if step_s is None else step_s
    return Carrier(rank, push_bytes, staging_limit_bytes, push_bytes / rates.ingest_bytes_per_s, step_s)


def carried(
    model: Model, catalog: Catalog, carriers: Sequence[Carrier], push_every_s: float
) -> dict[str, Any]:
    """How many workers of a model are carried, and which bound says so. `carriers`: of each rank that has a part of it."""
    config = catalog.config
    slowest = max(carriers, key=lambda each: each.push_s)
    fullest = min(carriers, key=lambda each: each.most_staged)
    row_bytes = WORKER_BYTES + RECEIPTS_KEPT * RECEIPT_BYTES
    bounds = {
        "rate": math.floor(push_every_s / slowest.push_s),
        "staging": fullest.most_staged,
        "table": min(config.max_workers, config.worker_bytes // row_bytes),
    }
    tightest = min(bounds, key=lambda name: bounds[name])
    ranks = {"rate": slowest.rank, "staging": fullest.rank, "table": 0}
    return {
        "name": model.name,
        "push_bytes": sum(each.push_bytes for each in carriers),
        "push_every_s": push_every_s,
        "step_s": max(each.step_s for each in carriers),
        "pushes_per_s": 1 / slowest.push_s,
        "workers_live": model.sessions.live_count(),
        "workers": bounds[tightest],
        "bound_by": tightest,
        "bounds": bounds,
        **({"bound_rank": ranks[tightest]} if len(carriers) > 1 else {}),
    }


def _last_step_s(model: Model) -> float | None:
    """Seconds that the last step took; None before the first."""
    receipt = model.last_receipt
    return float(receipt.times.step_s) if receipt is not None and receipt.times.step_s > 0 else None


def _step_s(layout: Layout, rates: Rates) -> float:
    """Seconds that a step takes by the rates."""
    elements: dict[str, int] = {}
    for arena in layout.arenas:
        rule = rule_of(layout, arena.group).name
        elements[rule] = elements.get(rule, 0) + arena.elements
    return sum(count / rates.step_elements_per_s[rule] for rule, count in elements.items())
