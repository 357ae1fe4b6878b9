"""pushstep.client: the package that a worker installs.

`connect` opens a session with a server. `session.attach(optimizer)` returns an optimizer whose steps the server
takes. The session's own methods do the same with numpy arrays, without an optimizer.
"""

from .membership.receipt import Outcome, Receipt
from .optimizer.remote_optimizer import RemoteOptimizer
from .session import Session, connect
from .transport.security import TLS

__all__ = ["TLS", "Outcome", "Receipt", "RemoteOptimizer", "Session", "connect"]
