"""Hooks: named code at torch's six hook points, from a catalogue; an operator adds, orders and removes them.

A hook is a transform (changes what the step does), a guard (may refuse the push) or an observer (only looks). Code
never arrives over the wire: a hook is chosen by name and its settings are validated. One file per hook; `chain` is
what a model has installed.
"""

from typing import Final

from .clip_grad_norm import ClipGradNorm
from .finite_guard import FiniteGuard
from .hook import Hook, Point
from .json_log import JsonLog
from .lr_scheduler import LRScheduler

CATALOGUE: Final[dict[str, type[Hook]]] = {
    hook.name: hook for hook in (ClipGradNorm, FiniteGuard, JsonLog, LRScheduler)
}

__all__ = ["CATALOGUE", "Hook", "Point"]
