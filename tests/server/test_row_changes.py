"""Which rows have changed behind a version: what is known of the last versions agrees with a scan of all."""

from __future__ import annotations

import random

import torch

from pushstep.proto.types_pb2 import Manifest, Parameter, ParamGroup
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Layout
from pushstep.server.arenas.row_changes import LEAST_IDS, MOST_PUSHES, RowChanges

(SLOT,) = Layout(
    Manifest(
        parameters=[Parameter(name="table", shape=[5000, 2], dtype=dtypes.to_wire(torch.float32, ""))],
        groups=[ParamGroup(rule="adagrad")],
    )
).slots


def test_after_any_version() -> None:
    draw, changes = random.Random(0), RowChanges()
    versions = changes.of(SLOT, 3, 7, torch.device("cpu"))
    assert changes.of(SLOT, 9, 9, torch.device("cpu")) is versions
    for version in range(8, 60):
        if draw.random() < 0.05:
            changes.all_of(SLOT.index, version)
        else:
            ids = torch.tensor(sorted(draw.sample(range(5000), draw.choice([0, 3, 200, LEAST_IDS + 1]))))
            versions.index_fill_(0, ids.long(), version)
            changes.add(SLOT, ids.long(), version)
        for have in {0, 3, 6, 7, version, *draw.sample(range(version), 3)}:
            found = changes.after(SLOT.index, have)
            assert found is not None
            assert torch.equal(found, torch.nonzero(versions > have).flatten())
    assert changes.after(SLOT.index, None) is None


def test_what_is_kept_does_not_grow_with_the_pushes() -> None:
    """Neither with their number nor with the ids that they have of other tables; nor when they have none of this one."""
    changes = RowChanges()
    versions = changes.of(SLOT, 0, 0, torch.device("cpu"))
    of_all_tables = torch.arange(1_000_000)
    for version in range(1, 3 * MOST_PUSHES):
        ids = of_all_tables[version % 3 : version % 3 + version % 2]
        versions.index_fill_(0, ids, version)
        changes.add(SLOT, ids, version)
    kept = [ids for _, ids in changes._recent[SLOT.index]._log]
    assert sum(ids.untyped_storage().nbytes() for ids in kept) == 8 * len(kept) <= 8 * LEAST_IDS
    assert len(kept) <= MOST_PUSHES
    for have in (version - 5, version - 2 * MOST_PUSHES, 0):
        assert torch.equal(changes.after(SLOT.index, have), torch.nonzero(versions > have).flatten())
