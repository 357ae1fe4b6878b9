"""pushstep.client: the package that a worker installs.

`connect` opens a session with a server. `session.attach(optimizer)` returns an optimizer whose steps the server
takes. The session's own methods do the same with numpy arrays, without an optimizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .connection import connect
    from .membership.receipt import Outcome, Receipt
    from .optimizer.remote_optimizer import RemoteOptimizer
    from .session import Session
    from .transport.security import TLS

__all__ = ["TLS", "Outcome", "Receipt", "RemoteOptimizer", "Session", "connect"]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first asked for: the `pushstep` command starts without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .connection import connect
    from .membership.receipt import Outcome, Receipt
    from .optimizer.remote_optimizer import RemoteOptimizer
    from .session import Session
    from .transport.security import TLS

    public = (TLS, Outcome, Receipt, RemoteOptimizer, Session, connect)
    globals().update(zip(__all__, public, strict=True))
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
