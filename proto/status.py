"""The public path of `errors/status.py`, which programs outside this repository import."""

from .errors.status import from_rpc_error as from_rpc_error
from .errors.status import from_status as from_status

__all__ = ["from_rpc_error", "from_status"]
