"""Sends the snapshots of models from the data folder to the store that `--snapshots` names.

Sending never holds up a model. A snapshot that the store does not take stays in the data folder; an event and the
durability resource say so. It is tried again, with longer and longer waits, or a newer one in its place. Older snapshots and
the journal are removed only behind a snapshot that was sent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from pushstep.proto.errors import PushstepError, UnknownSnapshot

from ..process.threads import STORE
from .bucket import in_words
from .remote import Remote

log = logging.getLogger("pushstep.sender")
FIRST_WAIT_S: Final = 2.0
LONGEST_WAIT_S: Final = 300.0
# Uploads at once. Each holds some chunks in memory.
AT_ONCE: Final = 2


class Model(Protocol):
    """What is needed of a model."""

    name: str
    uid: bytes
    deleted: bool

    def record(self, kind: str, by: str, **facts: Any) -> None:
        """Note an event."""


M = TypeVar("M", bound=Model)
# removes older snapshots that are not needed once this one was sent
Prune = Callable[[M, str], Awaitable[None]]


@dataclass(slots=True)
class Sending:
    """How the snapshots of one model are being sent."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    # older snapshots are being removed
    is_pruning: bool = False
    # the newest snapshot that was sent, behind which the others may go; empty: nothing is to be removed
    prune_behind: str = ""
    # when they are sent next; None if nothing is to be sent
    due_s: float | None = None
    wait_s: float = FIRST_WAIT_S
    # the newest one that was sent by this process
    sent: str = ""
    problem: str = ""
    # the time of day at which the problem began; 0: there is none
    since: float = 0.0


class Sender:
    """Sends the snapshots of all models of a catalog, one of a model at a time. Call it on the event loop only."""

    def __init__(self, remote: Remote, models: Path) -> None:
        """`models`: the folder of the models' folders."""
        self._remote = remote
        self._models = models
        self._sendings: dict[bytes, Sending] = {}
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._trash_due_s = 0.0

    def note(self, model: Model) -> None:
        """A snapshot of the model was written into the data folder."""
        self._of(model).due_s = time.monotonic() + (self._of(model).wait_s if self._of(model).problem else 0)

    def _of(self, model: Model) -> Sending:
        return self._sendings.setdefault(model.uid, Sending())

    def describe(self, model: Model) -> dict[str, Any]:
        """For operators."""
        sending = self._of(model)
        due_s = sending.due_s
        return {
            "url": self._remote.bucket.shown,
            "sent": sending.sent or None,
            "is_behind": due_s is not None or sending.lock.locked(),
            "problem": sending.problem or None,
            "since": sending.since or None,
            "retry_in_s": round(max(0.0, due_s - time.monotonic()), 1) if sending.problem and due_s else None,
        }

    def start_due(self, models: Iterable[M], prune: Prune[M]) -> None:
        """Start to send the snapshots that are due, and to delete those of deleted models."""
        now_s = time.monotonic()
        for model in models:
            sending = self._of(model)
            if sending.due_s is not None and sending.due_s <= now_s and not sending.lock.locked():
                self._start(self._send_due(model, sending, prune))
        if self._remote.has_trash and not self._tasks and self._trash_due_s <= now_s:
            self._trash_due_s = now_s + LONGEST_WAIT_S
            self._start(self._empty_trash())

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send_due(self, model: M, sending: Sending, prune: Prune[M]) -> None:
        async with sending.lock, self._turns:
            sending.due_s = None
            try:
                await self._send_all(model, sending)
            except Exception as error:  # noqa: BLE001 - whatever it was, it is tried again
                self._failed(model, sending, error)
        await self._prune(model, sending, prune)

    async def _send_all(self, model: Model, sending: Sending) -> None:
        """Send all snapshots that are in the data folder only. Of the automatic ones only the newest is sent."""
        store = self._remote.store(self._models / model.name)
        newest = await STORE.run(store.send_unsent)
        self._went_well(model, sending, newest)
        sending.prune_behind = newest or sending.prune_behind

    async def _prune(self, model: M, sending: Sending, prune: Prune[M]) -> None:
        """Remove older snapshots. Without the lock, so that the next snapshot can be sent meanwhile."""
        if sending.is_pruning:
            return
        sending.is_pruning = True
        try:
            while sending.prune_behind:
                newest, sending.prune_behind = sending.prune_behind, ""
                await prune(model, newest)
        finally:
            sending.is_pruning = False

    async def send(self, model: Model, snapshot: str) -> None:
        """Send a snapshot that an operator has asked for. If that fails, raises the error; it is tried again with the others.

        It stays in the data folder until then, because the model may need it.
        """
        store, sending = self._remote.store(self._models / model.name), self._of(model)
        async with sending.lock:
            try:
                await STORE.run(store.send, snapshot)
            except Exception as error:
                self._failed(model, sending, error)
                raise
            self._went_well(model, sending, snapshot)

    async def send_last(self, model: M, prune: Prune[M]) -> None:
        """Send the last snapshot, at a stop. If that fails, raises the error; the snapshot stays in the data folder."""
        sending = self._of(model)
        async with sending.lock, self._turns:
            await self._send_all(model, sending)
        await self._prune(model, sending, prune)

    def _went_well(self, model: Model, sending: Sending, snapshot: str) -> None:
        if snapshot:
            sending.sent = snapshot
        if sending.problem:
            log.info("model %s: sending snapshots works again", model.name, extra={"model": model.name})
            model.record("snapshots_sent_again", "server", snapshot=snapshot)
        sending.problem, sending.since, sending.wait_s = "", 0.0, FIRST_WAIT_S

    def _failed(self, model: Model, sending: Sending, error: Exception) -> None:
        if model.deleted:
            return
        problem = error.message if isinstance(error, PushstepError) else in_words(error)
        sending.due_s = time.monotonic() + sending.wait_s
        log.warning(
            "model %s: a snapshot could not be sent, next try in %.0f s: %s",
            model.name,
            sending.wait_s,
            problem,
            extra={"model": model.name},
        )
        sending.wait_s = min(2 * sending.wait_s, LONGEST_WAIT_S)
        if not sending.problem:
            sending.since = time.time()
            model.record("snapshots_away", "server", problem=problem)
        sending.problem = problem

    async def _empty_trash(self) -> None:
        try:
            await STORE.run(self._remote.empty_trash)
        except (PushstepError, OSError, UnknownSnapshot) as error:
            log.warning("the snapshots of deleted models are still in the store: %s", error)
        else:
            self._trash_due_s = 0.0

    async def close(self) -> None:
        """Wait for what is under way."""
        if self._tasks:
            await asyncio.wait(self._tasks)
