"""What is kept for the next push or snapshot is given back, each at its time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch

from pushstep.server.capacity.idle_memory import rest
from pushstep.server.captures import capture
from pushstep.server.config import Config
from pushstep.server.models.catalog import Catalog

MIB = 1 << 20


def test_a_snapshots_memory_is_kept_while_a_model_is_trained_and_a_pushs_is_not(data: Path) -> None:
    async def case() -> None:
        catalog = Catalog(Config(data=data))
        capture.rest()
        capture.rest()  # nothing is left of other tests
        block = capture.block_memory(MIB, torch.float32)
        body = catalog.staging.buffer(4 * MIB)
        del block, body
        assert not await rest(catalog, is_trained=True)  # both were used since the look before
        assert await rest(catalog, is_trained=True)  # the push's
        assert not await rest(catalog, is_trained=True)
        assert not await rest(catalog, is_trained=False)
        assert await rest(catalog, is_trained=False)  # the snapshot's
        assert not await rest(catalog, is_trained=False)

    asyncio.run(case())
