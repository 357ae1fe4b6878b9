"""Which rows have changed behind a version: what is known of the last versions agrees with a scan of all."""

from __future__ import annotations

import random

import torch

from pushstep.proto.types_pb2 import Manifest, Parameter, ParamGroup
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Layout
from pushstep.server.arenas.row_changes import LEAST_IDS, RowChanges

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
