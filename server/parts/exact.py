"""One exact version of a part, encoded in the writer thread between two steps, for readers who get the same of every rank."""

from __future__ import annotations

import asyncio
import logging

import torch
from torch import Tensor

from ..arenas.arena import Arenas, Flags
from ..arenas.publisher import Published, Publisher

log = logging.getLogger("pushstep.parts")


class ExactAnswer:
    """The answer to an Exchange: the version that its own step makes."""

    def __init__(
        self,
        publisher: Publisher,
        arenas: Arenas,
        timeline: int,
        have_version: int | None,
        wire: torch.dtype | None,
    ) -> None:
        # None until the step is taken, and if there was no room for its version: the worker pulls then
        self.published: Published | None = None
        self.wire = wire
        self.nbytes = sum((flat.numel() * (wire or flat.dtype).itemsize for flat in arenas.parameters), 0)
        self._publisher = publisher
        self._timeline = timeline
        self._have = have_version
        self._loop = asyncio.get_running_loop()

    def copy_out(self, arenas: Arenas) -> list[Tensor] | None:
        """The kernel writes nowhere else: frames are encoded afterwards."""
        return None

    def after_step(self, arenas: Arenas, written: Flags | None) -> None:
        """Encode the version that a step has just made. A failure must not fail the step, which is taken."""
        try:
            self.published = self._publisher.this_version(self._timeline, self._have, self.wire, self._loop)
        except Exception:
            log.exception("a version was not encoded")  # the worker pulls, and meets the same fault there
            self.published = None
