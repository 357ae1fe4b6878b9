"""Gives memory back while nobody uses it: what is kept of the last pushes and answers for the next ones.

That is as much again as a gradient, and as the parameters in each wire dtype. Fresh memory costs the next push its page faults,
once. What a snapshot needs, as much again as a model, is kept while any model is trained: the next one needs it again, and
the step that waited for 1 GB of fresh memory took 0.5 s.
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
    before = _versions(catalog)
    while True:
        await asyncio.sleep(LOOK_S)
        now = _versions(catalog)
        if await rest(catalog, is_trained=now != before):
            await DISK.run(give_back_freed)
        before = now


def _versions(catalog: Catalog) -> dict[bytes, int]:
    return {model.uid: model.version for model in catalog.models.values()}


async def rest(catalog: Catalog, *, is_trained: bool) -> bool:
    """Free what nobody has used since the last call. True if some was freed."""
    jobs = [job for model in catalog.models.values() if (job := model.publisher.rest()) is not None]
    if jobs:
        await asyncio.wait(jobs)
    freed = [catalog.staging.rest(), not is_trained and capture.rest()]
    return bool(jobs) or any(freed)
