"""Gives memory back while nobody uses it: what is kept of the last pushes and answers for the next ones.

That is as much again as a gradient, and as the parameters in each wire dtype. Fresh memory costs the next push its page faults,
20 ms for 64 MB, once.
"""

from __future__ import annotations

import asyncio
from typing import Final

from ..captures import capture
from ..models.catalog import Catalog
from ..process.memory import give_back_freed
from ..process.threads import DISK

# What is not used between two looks is given back.
LOOK_S: Final = 5.0


async def give_back_idle(catalog: Catalog) -> None:
    """Look at a server's memory from time to time, until this is cancelled."""
    while True:
        await asyncio.sleep(LOOK_S)
        if await rest(catalog):
            await DISK.run(give_back_freed)


async def rest(catalog: Catalog) -> bool:
    """Free what nobody has used since the last call. True if some was freed."""
    jobs = [job for model in catalog.models.values() if (job := model.publisher.rest()) is not None]
    if jobs:
        await asyncio.wait(jobs)
    kept = [catalog.staging.rest(), capture.rest()]
    return bool(jobs) or any(kept)
