"""The log of the doors: each line says which model, worker and push the request was about.

Only what runs as the request itself may log here. A callback or a task of a model would say who happened to start it.
"""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any, Final

_ABOUT: Final[ContextVar[tuple[str, str, int]]] = ContextVar("about", default=("", "", 0))
# of the request's trace, if there is one
TRACE_ID: Final[ContextVar[str]] = ContextVar("trace_id", default="")


def about(model: str = "", worker: str = "", sequence: int = 0) -> None:
    """Say what the request under way is about. It takes 0.1 us."""
    _ABOUT.set((model, worker, sequence))


def subject() -> tuple[str, str, int]:
    """The model, the worker and the sequence of the request under way, as far as they are known."""
    return _ABOUT.get()


class RequestLog(logging.LoggerAdapter[logging.Logger]):
    """A logger whose records have the fields of the request under way."""

    def __init__(self, name: str) -> None:
        super().__init__(logging.getLogger(name), {})

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Add the fields to those that the caller gives."""
        model, worker, sequence = _ABOUT.get()
        fields = {"model": model, "worker": worker, "sequence": sequence, "trace_id": TRACE_ID.get()}
        kwargs["extra"] = {**fields, **kwargs.get("extra", {})}
        return msg, kwargs
