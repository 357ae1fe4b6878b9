"""The hook catalogue: named code for torch's six hook points. An operator adds, orders and removes hooks.

A hook is a transform (changes what the step does), a guard (may refuse the push) or an observer (only looks). Code
never arrives over the wire: an operator chooses a hook by name, and its settings are validated. chain.py holds the hooks that a model has installed.
"""

from typing import Final

from .clipping import ClipGradNorm, ClipGradValue, Clipnorm, GlobalClipnorm
from .ema import EMA
from .finite_guard import FiniteGuard
from .gradients import GradientCentralization, GradientNoiseHook
from .hook import Hook
from .json_log import JsonLog
from .lr_scheduler import LRScheduler

CATALOGUE: Final[dict[str, type[Hook]]] = {
    hook.name: hook
    for hook in (
        ClipGradNorm,
        ClipGradValue,
        Clipnorm,
        EMA,
        FiniteGuard,
        GlobalClipnorm,
        GradientCentralization,
        GradientNoiseHook,
        JsonLog,
        LRScheduler,
    )
}
# The classes of this house. Those that others have brought are asked with more care.
BUILT_IN: Final = frozenset(CATALOGUE.values())
