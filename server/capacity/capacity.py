"""How full a server is, and how many workers of a model it carries.

The bounds of a model are each a number of workers; the lowest is what the server carries. A push is `push_bytes` long (every
parameter, in its own dtype), and each worker sends one in `push_every_s`:

    rate     push_every_s / max(push_bytes / ingest_bytes_per_s, step_s): a push is taken in while another one is stepped
    staging  limit / (push_bytes and what is on its way while it is read): so many pushes may be under way at once
    table    the workers that the server remembers: --max-workers, and --worker-bytes with a worker's row and receipts

`step_s` is of the model's last step; before its first it is elements / step_elements_per_s, by rule.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ..coordinator.sessions import RECEIPT_BYTES, WORKER_BYTES
from ..coordinator.worker import RECEIPTS_KEPT
from ..models.catalog import Catalog
from ..models.model import Model
from ..staging.budget import charge
from .rates import Rates

MEMORY: Final = Path("/proc/meminfo")


def usage(catalog: Catalog) -> dict[str, Any]:
    """The limits of the server, and how much of them is in use."""
    config, memory = catalog.config, _memory()
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
        "age_s": round(time.monotonic() - rates.measured_s, 1),
    }


def carried(model: Model, catalog: Catalog, rates: Rates, push_every_s: float) -> dict[str, Any]:
    """How many workers of a model this server carries, and which bound says so."""
    config, arenas = catalog.config, model.layout.arenas
    push_bytes = sum(arena.elements * arena.dtype.itemsize for arena in arenas)
    step_s = _step_s(model, rates)
    push_s = max(push_bytes / rates.ingest_bytes_per_s, step_s, 1e-9)
    row_bytes = WORKER_BYTES + RECEIPTS_KEPT * RECEIPT_BYTES
    bounds = {
        "rate": math.floor(push_every_s / push_s),
        "staging": catalog.staging.total_bytes // max(1, charge(push_bytes)),
        "table": min(config.max_workers, config.worker_bytes // row_bytes),
    }
    tightest = min(bounds, key=lambda name: bounds[name])
    return {
        "name": model.name,
        "push_bytes": push_bytes,
        "push_every_s": push_every_s,
        "step_s": step_s,
        "pushes_per_s": 1 / push_s,
        "workers_live": model.sessions.live_count(),
        "workers": bounds[tightest],
        "bound_by": tightest,
        "bounds": bounds,
    }


def _step_s(model: Model, rates: Rates) -> float:
    """Seconds that a step takes: as the last one took, or else as the rates say."""
    receipt = model.last_receipt
    if receipt is not None and receipt.times.step_s > 0:
        return float(receipt.times.step_s)
    elements: dict[str, int] = {}
    for arena in model.layout.arenas:
        rule = model.groups.list[arena.group].rule.name
        elements[rule] = elements.get(rule, 0) + arena.elements
    return sum(count / rates.step_elements_per_s[rule] for rule, count in elements.items())


def _memory() -> Mapping[str, int]:
    """What the kernel says of the host's memory, in bytes; nothing where there is no such file."""
    try:
        lines = MEMORY.read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split()[:2] for line in lines if len(line.split()) >= 2)
    return {name.rstrip(":"): int(count) * 1024 for name, count in pairs if count.isdigit()}
