"""What a model writes into its journal, and who waits for it.

Everything that is decided on the event loop becomes a record, in that order: the model's writer thread appends it before
the step that it is of. At `durable` an outcome is given, and a version shown, once its record is on the disk. What is not
a step or an outcome is found by comparison with the last record: param groups, hooks, policy, gate, and the rows of the
worker table that `Sessions` has marked.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Callable, Sequence, Set
from typing import Any, Final, Protocol

from torch import Tensor

from pushstep.proto.errors import PushstepError
from pushstep.proto.journal_pb2 import JournalExtras, JournalRecord, JournalStep, JournalValues
from pushstep.proto.types_pb2 import Segment

from ..arenas.writer import ModelWriter
from ..coordinator.commits import Commits
from ..coordinator.coordinator import Coordinator
from ..coordinator.decision import Resolve, Step
from ..coordinator.sessions import Sessions
from ..storage.journal import Journal, Level
from ..storage.journal_sync import JournalSync
from .journal_records import failure_message, gradient_message, outcome_message, payload_of, tensors_of

NOTHING: Final = b""


class Owner(Protocol):
    """The model whose changes are recorded."""

    coordinator: Coordinator
    commits: Commits
    sessions: Sessions
    writer: ModelWriter
    edit: int


class Entry:
    """One record, and how it is appended: in the writer thread, before anything that it is of is done."""

    def __init__(self, journal: Journal, record: JournalRecord, tensors: Sequence[Tensor], room: int) -> None:
        self._journal = journal
        self.record = record
        self._tensors = tensors
        # bytes that were promised for it
        self._room = room
        # its number, once it was appended
        self.number = 0

    def append(self) -> None:
        """Append it. DiskFull, StorageFailed."""
        try:
            self.number = self._journal.append(self.record, payload_of(self._tensors))
        finally:
            self._tensors = ()
            if self._room:
                self._journal.give_back_room(self._room)


class Journaling:
    """One model's way into its journal. Call it on the event loop only."""

    def __init__(self, model: Owner, sync: JournalSync) -> None:
        self._model = model
        self._sync = sync
        self.journal: Journal | None = None
        # what the last record, or the snapshot before it, has said of the manifest
        self._said: dict[str, Any] = {}
        self._said_groups: list[tuple[object, Set[str]]] = []
        # by record: what is done once it is safe; and futures by the version that they wait for
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._versions: list[tuple[int, asyncio.Future[None]]] = []

    @property
    def level(self) -> Level:
        """How safe a push is when it is acknowledged."""
        return Level.APPLIED if self.journal is None else self.journal.level

    def begin(self, journal: Journal | None) -> None:
        """Write into this journal from here on, or into none."""
        self.journal = journal
        self.forget()

    def forget(self) -> None:
        """Have the next record say everything that it can: what was said before was not written."""
        self._said, self._said_groups = {}, []

    # Records.

    def step(self, step: Step) -> Entry | None:
        """The record of a step and of its pushes' outcomes."""
        journal = self.journal
        if journal is None:
            return None
        pushes = [resolve.pending.push or step.push for resolve in step.resolves]
        record = self._record(
            int(step.ticket.version),
            step.resolves,
            step=JournalStep(ticket=step.ticket, gradients=map(gradient_message, pushes)),
        )
        tensors = [tensor for push in pushes for tensor in tensors_of(push.parts)]
        return Entry(journal, record, tensors, sum(resolve.pending.room_bytes for resolve in step.resolves))

    def outcome(self, resolve: Resolve) -> Entry | None:
        """The record of an outcome without a step."""
        if self.journal is None or resolve.decided is None:
            return None
        record = self._record(self._model.commits.version, [resolve])
        return Entry(self.journal, record, (), resolve.pending.room_bytes)

    def values(
        self, version: int, resolves: Sequence[Resolve], parts: Sequence[tuple[Segment, Tensor]], fresh: Sequence[int]
    ) -> Entry | None:
        """The record of uploaded values."""
        if self.journal is None:
            return None
        message = JournalValues(segments=[segment for segment, _ in parts], fresh=fresh)
        record = self._record(version, resolves, values=message)
        return Entry(self.journal, record, [values for _, values in parts], 0)

    def extras(self, file: Tensor, *, are_all: bool) -> Entry | None:
        """The record of buffers that were uploaded as a safetensors file."""
        if self.journal is None:
            return None
        message = JournalExtras(file_bytes=file.numel(), all=are_all)
        record = self._record(self._model.commits.version, (), extras=message)
        return Entry(self.journal, record, [file], 0)

    def failure(self, version: int, error: PushstepError) -> Entry | None:
        """The record of a step that has failed and moved nothing, though its record was written."""
        if self.journal is None:
            return None
        return Entry(self.journal, self._record(version, (), failure=failure_message(error)), (), 0)

    def change(self) -> Entry | None:
        """The record of what else has changed since the last one. None if nothing has."""
        if self.journal is None:
            return None
        record = self._record(self._model.commits.version, ())
        return Entry(self.journal, record, (), 0) if record.changed else None

    def _record(self, version: int, resolves: Sequence[Resolve], **change: Any) -> JournalRecord:
        workers = self._model.sessions.workers
        outcomes = [
            outcome_message(resolve, workers[resolve.pending.worker].refused_in_row) for resolve in resolves
        ]
        return JournalRecord(
            timeline=self._model.commits.timeline,
            version=version,
            outcomes=outcomes,
            changed=self._changed(bool(outcomes and change)),
            **change,
        )

    def _changed(self, is_step: bool) -> bytes:
        """As JSON, the entries of the manifest that the last record has not said. `is_step`: it says the values."""
        found: dict[str, Any] = {}
        for name, now in self._now().items():
            if self._said.get(name) != now:
                found[name] = self._said[name] = now
        groups = self._model.commits.groups
        held = [(group.values, frozenset(group.pinned)) for group in groups.list]
        said = [pinned for _, pinned in self._said_groups] == [pinned for _, pinned in held] and (
            is_step or all(a is b for (a, _), (b, _) in zip(self._said_groups, held, strict=True))
        )
        if not said:
            found["groups"] = groups.dump()
        self._said_groups = list(held)
        rows = self._model.sessions.take_changed()
        if rows:
            found["workers"] = rows
        return json.dumps(found).encode() if found else NOTHING

    def _now(self) -> dict[str, Any]:
        model, hooks = self._model, self._model.commits.hooks
        now: dict[str, Any] = {
            "edit": model.edit,
            "gate": model.coordinator.admission.dump(),
            "forgotten_epoch": model.sessions.forgotten_epoch,
        }
        if hooks.list or self._said.get("hooks"):
            now["hooks"] = hooks.dump()
        settings = model.coordinator.policy.settings
        if self._said.get("settings") is not settings:
            now["policy"] = settings.model_dump(mode="json")
            self._said["settings"] = settings
        return now

    # Waiting.

    def when_safe(self, number: int, then: Callable[[], None]) -> None:
        """Call `then` once record `number` is as safe as the level says: at once, unless at `durable`."""
        journal = self.journal
        if journal is None:
            then()
            return
        self._sync.request(journal, self._synced(journal))
        if journal.level is Level.DURABLE:
            self._waiting.append((number, then))
        else:
            then()

    async def until_shown(self, version: int) -> None:
        """Wait until a version may be shown to others: at `durable`, until it is on the disk."""
        journal = self.journal
        if journal is None or journal.level is not Level.DURABLE or version <= journal.durable_version:
            return
        waits: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._versions.append((version, waits))
        self._sync.request(journal, self._synced(journal))
        await waits

    async def until_safe(self) -> None:
        """Wait until everything decided so far is as safe as the level says."""
        journal = self.journal
        if journal is None or journal.level is not Level.DURABLE:
            return
        number = await self._model.writer.submit(lambda: journal.appended)
        safe: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.when_safe(number, lambda: safe.done() or safe.set_result(None))
        await safe

    def _synced(self, journal: Journal) -> Callable[[], None]:
        loop = asyncio.get_running_loop()

        def synced() -> None:
            loop.call_soon_threadsafe(self.note_durable, journal)

        return synced

    def note_durable(self, journal: Journal) -> None:
        """Do what has waited for records that are on the disk."""
        if journal is not self.journal:
            return
        number = journal.note_durable()
        while self._waiting and self._waiting[0][0] <= number:
            self._waiting.popleft()[1]()
        version, waiting = journal.durable_version, self._versions
        self._versions = [(at, waits) for at, waits in waiting if at > version]
        for at, waits in waiting:
            if at <= version and not waits.done():
                waits.set_result(None)
        if self._waiting and journal.is_based:
            self._sync.request(journal, self._synced(journal))

    def let_go(self) -> None:
        """Do everything that waits: the journal has been closed, and everything is on the disk."""
        while self._waiting:
            self._waiting.popleft()[1]()
        for _, waits in self._versions:
            if not waits.done():
                waits.set_result(None)
        self._versions = []
