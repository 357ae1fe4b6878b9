"""What a worker is made with: the options of `connect` that outlive it."""

from __future__ import annotations

from dataclasses import dataclass

from ..gradients.compression import Wire


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """The options of one worker; `pushstep.client.connect` describes and checks them."""

    model: str
    worker: str
    wire: Wire = None
    top_k: float | None = None
    retry_for_s: float = 300.0
    takeover: bool = False
    on_reject: str = "raise"
    on_restore: str = "continue"
    shared_memory: bool = True
