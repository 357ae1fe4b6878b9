"""The pushes that a model holds, and the senders that wait for their outcomes.

The sender of a push waits for its outcome. It comes after the step, once its record is as safe as the model's level
demands. A retry of the push waits for the same outcome. The bytes of a push stay reserved until it is resolved, also when
its sender has gone.
"""

from __future__ import annotations

import asyncio
import copy
import time
from asyncio import FIRST_COMPLETED
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from pushstep.proto.errors import NotHeld, PushPending
from pushstep.proto.types_pb2 import Identity

from ..arenas.arena import Arenas, Flags
from ..coordinator.coordinator import Coordinator
from ..coordinator.decision import Resolve
from ..coordinator.push import Key, PendingPush, key_of
from ..coordinator.worker import Decided

# The longest wait for other workers. Then the answer is `push_pending`, and the worker asks again.
HOLD_S: Final = 10.0


class Answer(Protocol):
    """The answer that a step writes into memory that it shares with the worker."""

    nbytes: int
    # the dtype that is written; None: each parameter's own
    wire: torch.dtype | None

    def copy_out(self, arenas: Arenas) -> list[Tensor] | None:
        """For each arena, where the step's kernel may also write the new parameters; None for nowhere."""

    def after_step(self, arenas: Arenas, written: Flags | None) -> None:
        """Complete the answer. The values of the slots that `written` marks are there already."""


@dataclass(slots=True, eq=False)
class _Kept:
    """A push that is not resolved yet, and the future that gets its outcome."""

    pending: PendingPush
    resolved: asyncio.Future[Resolve]
    # gives back the bytes that the push holds
    release: Callable[[], None]
    # what its step writes into shared memory
    answer: Answer | None


class HeldPushes:
    """Holds the pushes of one model until they are resolved. Call it on the event loop only."""

    def __init__(
        self,
        coordinator: Coordinator,
        require_whole: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`require_whole` raises if nothing can be stepped any more. `clock`: that of the event loop."""
        self._coordinator = coordinator
        self._require_whole = require_whole
        self._clock = clock
        self._kept: dict[Key, _Kept] = {}
        self._moved: asyncio.Future[None] | None = None
        self._let_go = False

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, pending: PendingPush, release: Callable[[], None], answer: Answer | None) -> None:
        """Hold an accepted push. Once it is resolved, `release` is called."""
        resolved = asyncio.get_running_loop().create_future()
        self._kept[pending.key] = _Kept(pending, resolved, release, answer)

    def identities(self) -> Iterator[Identity]:
        """The pushes that are not resolved yet."""
        return (kept.pending.identity for kept in self._kept.values())

    def answers_of(self, pending: PendingPush) -> Answer | None:
        """What the step of a push writes into shared memory."""
        kept = self._kept.get(pending.key)
        return None if kept is None else kept.answer

    def resolve(self, resolve: Resolve) -> None:
        """Resolve a push: its senders are answered, and its bytes given back."""
        kept = self._kept.pop(resolve.pending.key, None)
        if kept is not None:
            kept.resolved.set_result(resolve)
            kept.release()

    async def answer(self, identity: Identity, hold_s: float) -> Decided:
        """A push's outcome once its step is taken. PushPending if that takes longer than `hold_s`.

        NotHeld if the push is unknown; the error that it was resolved with, if it has no outcome.
        """
        kept = self._kept.get(key_of(identity))
        if kept is None:
            decided = self._coordinator.decided_of(identity)
            if decided is None:
                raise NotHeld(worker=identity.worker, sequence=identity.sequence)
            return decided
        future = kept.resolved
        until_s = self._clock() + hold_s
        while not future.done() and (left_s := until_s - self._clock()) > 0:
            if self._let_go and self._coordinator.decided_of(identity) is None:
                break  # a step that is under way is still waited for
            waits: set[asyncio.Future[Any]] = {future, self._next_move()}
            await asyncio.wait(waits, timeout=left_s, return_when=FIRST_COMPLETED)
        if not future.done():
            self._require_whole()
            stepped = self._coordinator.decided_of(identity) is not None
            raise self.pending(identity.worker, kept.pending.digest, stepped=stepped)
        resolved = future.result()
        if resolved.decided is None:
            raise copy.copy(resolved.error or NotHeld(worker=identity.worker, sequence=identity.sequence))
        return resolved.decided

    async def change(self, until_s: float, worker: str) -> None:
        """Return after the next event. PushPending if `until_s` comes first, or if the server stops."""
        left_s = until_s - self._clock()
        if left_s > 0 and not self._let_go:
            await asyncio.wait({self._next_move()}, timeout=left_s)
        if self._let_go or self._clock() >= until_s:
            self._require_whole()
            raise self.pending(worker, 0)

    def pending(self, worker: str, digest: int, *, stepped: bool = False) -> PushPending:
        """The error for a push that waits for others. `digest`: of its body if that is held, else 0."""
        policy = self._coordinator.policy
        missing = policy.missing(self._coordinator.pending_pushes.view(self._clock()))
        why = "its step is being taken" if stepped else missing
        return PushPending(worker=worker, policy=policy.name, why=why, digest=digest, retry_after_s=0.0)

    def let_go(self) -> None:
        """End every wait: the server stops."""
        self._let_go = True
        self.wake()

    def _next_move(self) -> asyncio.Future[None]:
        if self._moved is None or self._moved.done():
            self._moved = asyncio.get_running_loop().create_future()
        return self._moved

    def wake(self) -> None:
        """Wake all that wait for a change."""
        if self._moved is not None and not self._moved.done():
            self._moved.set_result(None)

    def give_back(self) -> None:
        """Release the pushes that were never resolved: nothing steps them any more."""
        while self._kept:
            self._kept.popitem()[1].release()
