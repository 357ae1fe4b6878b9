"""What a model has counted since this process serves it, as JSON: whoever looks twice has rates and means between.

Everything is read from plain numbers: nothing is asked of the writer.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, Final

from ...counters.histogram import Histogram
from ...counters.model_counts import OUTCOMES
from ...models.model import Model
from ..numbers import finite

# Groups whose lr is shown. GET .../param-groups lists all.
GROUPS_SHOWN: Final = 16


def figures(model: Model) -> dict[str, Any]:
    """Pushes by outcome, time in each room, staleness, learning rates, and how safe the model is."""
    counts = model.counts
    return {
        "pushes": {word: counts.outcomes[number] for number, word in OUTCOMES.items() if number},
        "refused": sum(counts.refusals.values()),
        "pending": len(model.held),
        "seconds": {room: _shown(histogram) for room, histogram in counts.rooms.items()},
        "staleness": _shown(counts.staleness),
        "lr": [finite(group.values["lr"]) for group in islice(model.groups.list, GROUPS_SHOWN)],
        "durability": model.durability.level,
        "durable_version": model.recorder.durable_version,
        "snapshot": {
            "version": counts.snapshots.version,
            "created": counts.snapshots.created_s or None,
        },
    }


def _shown(histogram: Histogram) -> dict[str, float]:
    return {"count": histogram.count, "sum": histogram.sum}
