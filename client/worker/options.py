"""What a worker is made with: the options of `connect` that outlive it."""

from __future__ import annotations

from dataclasses import dataclass

from ..gradients.compression import Wire


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """The options of one worker; `pushstep.client.connect` describes and checks them."""

    model: str
    worker: str
    wire: Wire
    top_k: float | None
    retry_for_s: float
    takeover: bool
    on_reject: str
    on_restore: str
    shared_memory: bool
