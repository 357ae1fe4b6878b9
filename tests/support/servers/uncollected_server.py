"""`pushstep-server` without garbage collection: SIGUSR1 has it write what only a collection would have freed.

A line on stdout, as JSON: of what is unreachable and still there, the frames of our code, and the bytes of what they hold.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import types
from pathlib import Path

import numpy as np
import torch

import pushstep.server
from pushstep.server import __main__ as command
from pushstep.server.service import ExitStatus, Service

ROOT = Path(pushstep.server.__file__).parents[1]
LARGE_BYTES = 32 << 10


def report() -> None:
    """Say what is unreachable, and let go of it."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    gc.collect()
    gc.set_debug(0)
    frames: set[str] = set()
    held: dict[int, int] = {}
    for found in gc.garbage:
        if type(found) is types.FrameType and Path(found.f_code.co_filename).is_relative_to(ROOT):
            frames.add(f"{Path(found.f_code.co_filename).name}:{found.f_code.co_name}")
        for held_by in (found, *gc.get_referents(found)):
            kind = type(held_by)  # isinstance() would ask a weakref's proxy for what is gone
            if issubclass(kind, (bytes, bytearray)):
                held[id(held_by)] = len(held_by)
            elif issubclass(kind, (np.ndarray, torch.Tensor)):
                held[id(held_by)] = held_by.nbytes
    gc.garbage.clear()
    gc.collect()
    large = sum(size for size in held.values() if size > LARGE_BYTES)
    print(json.dumps({"frames": sorted(frames), "bytes": large}), flush=True)


class ReportingService(Service):
    """Reports between two turns of its loop: a signal's own handler would run in the middle of anything."""

    async def run(self) -> ExitStatus:
        """Serve."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, report)
        return await super().run()


if __name__ == "__main__":
    gc.disable()
    gc.freeze()  # what was imported need not be looked through each time
    command.Service = ReportingService  # type: ignore[misc]
    command.main()
