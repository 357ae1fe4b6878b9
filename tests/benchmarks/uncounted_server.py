"""A server that counts no push: what counting costs is the difference to it."""

from __future__ import annotations

from typing import Any

from pushstep.server import __main__ as command
from pushstep.server.counters.histogram import Histogram
from pushstep.server.counters.model_counts import ModelCounts
from pushstep.server.requests import push
from pushstep.server.streams.readers import Reader


def nothing(*_: Any) -> None:
    """Counts nothing."""


if __name__ == "__main__":
    ModelCounts.decided = nothing  # type: ignore[method-assign]
    Histogram.observe = nothing  # type: ignore[method-assign]
    push.about = nothing
    Reader.counted = lambda self, messages: messages  # type: ignore[method-assign]
    command.main()
