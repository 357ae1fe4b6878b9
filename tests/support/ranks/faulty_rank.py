"""A rank that ends itself at a message between ranks: `faulty_server.py`, whose calls may also be these.

    python faulty_rank.py CALL DEED [SERVER OPTIONS]

A `CALL` "message:snapshot answered" is one of `MESSAGES`. `kill` is before it is sent or taken, `kill-after` behind it: of one that is
sent, once it has left.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pushstep.proto.shards_pb2 import RankMessage, RankOrder
from pushstep.server.__main__ import main
from pushstep.server.links.hub import Hub
from pushstep.server.links.link import RankLink
from pushstep.server.ranks.other import OtherRank
from tests.support.servers.faulty_server import armed_by, break_calls

# How long a message that was queued takes to leave: the loop's next turns write it.
LEAVE_S: Final = 0.05


def _orders_snapshot(order: Any) -> bool:
    return isinstance(order, RankOrder) and order.HasField("snapshot") and not order.snapshot.committed


def _orders_pruning(order: Any) -> bool:
    return isinstance(order, RankOrder) and order.HasField("snapshot") and order.snapshot.committed


def _answers(message: Any) -> bool:
    return isinstance(message, RankMessage) and message.HasField("done") and bool(message.done.snapshot)


# by name: the method through which a message goes, and which one it is
MESSAGES: Final[dict[str, tuple[type, str, Callable[[Any], bool]]]] = {
    # rank 0
    "snapshot ordered": (Hub, "send", _orders_snapshot),
    "answer taken": (Hub, "_take", _answers),
    "pruning ordered": (Hub, "send", _orders_pruning),
    # the others
    "order taken": (OtherRank, "take", _orders_snapshot),
    "snapshot answered": (RankLink, "say", _answers),
    "pruning taken": (OtherRank, "take", _orders_pruning),
}


def _end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def break_message(name: str, deed: str, is_armed: Callable[[], bool]) -> None:
    """Have the process end before or behind a message."""
    owner, method, is_it = MESSAGES[name]
    real = getattr(owner, method)
    leaves = method in ("send", "say")

    def call(*arguments: Any, **keywords: Any) -> Any:
        if not any(map(is_it, arguments)) or not is_armed():
            return real(*arguments, **keywords)
        if deed == "kill":
            _end()
        done = real(*arguments, **keywords)
        if leaves:
            asyncio.get_running_loop().call_later(LEAVE_S, _end)
        elif asyncio.iscoroutine(done):
            return _then_end(done)
        else:
            _end()
        return done

    setattr(owner, method, call)


async def _then_end(work: Any) -> None:
    await work
    _end()


if __name__ == "__main__":
    calls, what, *options = sys.argv[1:]
    armed = armed_by(Path(options[options.index("--data") + 1]))
    kind, _, which = calls.partition(":")
    if kind == "message":
        break_message(which, what, armed)
    else:
        break_calls(calls, what, armed)
    sys.argv = ["pushstep-server", *options]
    main()
