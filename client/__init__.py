"""pushstep.client: what a worker installs.

`connect` opens a session with a server; `session.attach(optimizer)` turns an optimizer into one whose steps the
server takes. Everything also works with numpy arrays through the session itself.
"""

from .receipt import Outcome as Outcome
from .receipt import Receipt as Receipt
from .remote_optimizer import RemoteOptimizer as RemoteOptimizer
from .session import Session as Session
from .session import connect as connect

__all__ = ["Outcome", "Receipt", "RemoteOptimizer", "Session", "connect"]
