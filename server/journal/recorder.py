"""What a model writes into its journal, and who waits for it.

Every decision of the event loop becomes a record, in the order of the decisions. The model's writer thread appends a step's
record before it takes the step. At `durable` a worker gets an outcome, and a reader sees a version, only after its record is
on the disk. Other changes are found by comparison with what the records so far have said: param groups, hooks, policy, gate,
and the rows of the worker table that `Sessions` has marked.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence, Set
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, Protocol

from torch import Tensor

from pushstep.proto.errors import PushstepError
from pushstep.proto.journal_pb2 import JournalExtras, JournalRecord, JournalStep, JournalValues
from pushstep.proto.types_pb2 import Durability, Segment

from ..arenas.writer import ModelWriter
from ..coordinator.commits import Commits, Revisions
from ..coordinator.coordinator import Coordinator
from ..coordinator.decision import Resolve, Step
from ..coordinator.sessions import Sessions
from ..coordinator.worker import Decided
from ..process.threads import DISK
from .durability import DurabilitySettings
from .entry import AGAIN_S, Entry
from .journal import Journal, Level
from .records import failure_message, gradient_message, outcome_message, tensors_of
from .sync import JournalSync

log = logging.getLogger("pushstep.journal")
NOTHING: Final = b""
DURABILITIES: Final = {
    Level.APPLIED: Durability.DURABILITY_APPLIED,
    Level.EVERYSEC: Durability.DURABILITY_EVERYSEC,
    Level.DURABLE: Durability.DURABILITY_DURABLE,
}


# An outcome, and the worker state that its push brought.
Given = tuple[Decided, bytes | None]


class Owner(Protocol):
    """The model whose changes are recorded."""

    coordinator: Coordinator
    commits: Commits
    sessions: Sessions
    writer: ModelWriter
    durability: DurabilitySettings
    edit: int
    revisions: Revisions


class Recorder:
    """One model's way into its journal. Call it on the event loop only."""

    def __init__(self, model: Owner, sync: JournalSync) -> None:
        self._model = model
        self._sync = sync
        self.journal: Journal | None = None
        # number and checksum of the last record, while there is no journal
        self.last = self.link = 0
        self._gives_up = False
        # the newest version on the disk, while there is no journal
        self.saved_version = 0
        # what the records so far have said of the manifest
        self._said: dict[str, Any] = {}
        self._said_groups: list[tuple[object, Set[str], bool]] = []
        self._said_settings: dict[str, object] = {}
        # (record, what is called once that record is safe), and (version, the future that waits for it)
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._versions: list[tuple[int, asyncio.Future[None]]] = []

    @property
    def level(self) -> Level:
        """How safe a push is when it is acknowledged."""
        return Level.APPLIED if self.journal is None else self.journal.level

    def begin(self, journal: Journal) -> None:
        """Write into this journal from here on."""
        self.journal = journal
        self.forget()
        self.tell_level()

    def give_up(self) -> None:
        """Wait no more for a disk that refuses records: the server stops."""
        self._gives_up = True

    def gives_up(self) -> bool:
        """True if a record that the disk refuses is not tried again."""
        return self._gives_up

    async def require_room(self) -> None:
        """Have room in the journal for the record of an edit or a join. JournalFull: change nothing then."""
        journal = self.journal
        if journal is not None and not journal.has_room_for_an_edit():
            await DISK.run(journal.take_room_for_an_edit)

    @asynccontextmanager
    async def room_for(self, need_bytes: int) -> AsyncIterator[None]:
        """Have room in the journal for a record of so many bytes, for a block. JournalFull: change nothing then."""
        journal = self.journal
        if journal is not None and not journal.has_room(need_bytes):
            await DISK.run(journal.take_room, need_bytes)
        try:
            yield
        finally:
            if journal is not None:
                journal.give_back_room(need_bytes)

    async def close(self) -> None:
        """Force the journal to the disk, and write into none any more."""
        journal, self.journal = self.journal, None
        if journal is None:
            return
        # behind the records that are queued
        await self._model.writer.submit(journal.close, reads=False)
        self.last, self.link = journal.appended, journal.link
        journal.note_durable()
        self.saved_version = max(self.saved_version, journal.durable_version)
        self.tell_level()
        self._let_go()

    def tell_level(self) -> None:
        """Have receipts name the level that holds now."""
        self._model.commits.durability = DURABILITIES[self.level]

    @property
    def durable_version(self) -> int:
        """The newest version that could be restored from the disk, with all before it."""
        return max(self.saved_version if self.journal is None else self.journal.durable_version, 0)

    def skip(self, kept_version: int) -> None:
        """Note a change that is not on the disk, above a version. Call it in the writer thread."""
        self.saved_version = min(self.saved_version, kept_version)
        journal = self.journal
        while journal is not None:
            try:
                journal.skip(kept_version)
                return
            except (OSError, PushstepError) as error:
                # without the note a start would lose the change, and nobody would know
                if self._gives_up:
                    journal.fail(journal.model, error)
                log.error("the journal waits for its disk: %s", error)
            time.sleep(AGAIN_S)

    @property
    def number(self) -> int:
        """The number of the last record that was appended. Call it in the writer thread."""
        return self.last if self.journal is None else self.journal.appended

    def forget(self) -> None:
        """Have the next record say the whole manifest again: this journal may not hold what was said before."""
        self._said, self._said_groups, self._said_settings = {}, [], {}

    # Records.

    def step(self, step: Step) -> Entry | None:
        """The record of a step and of its pushes' outcomes."""
        if self.journal is None:
            return None
        brought = step.parts or [resolve.pending.push or step.push for resolve in step.resolves]
        pushes = [push.own for push in brought]
        record = self._record(
            int(step.ticket.version),
            [_given(resolve) for resolve in step.resolves],
            hooks=step.hooks,
            step=JournalStep(ticket=step.ticket, gradients=map(gradient_message, pushes)),
        )
        tensors = [tensor for push in pushes for tensor in tensors_of(push.parts)]
        then = None
        if self.journal.level is Level.DURABLE:  # while the kernel steps, the disk works
            then = partial(self._sync.request, self.journal, self._synced(self.journal))
        return Entry(self.journal, record, tensors, then)

    def outcome(self, resolve: Resolve) -> Entry | None:
        """The record of an outcome without a step. None for a push that has none."""
        if self.journal is None or resolve.decided is None:
            return None
        return Entry(self.journal, self._record(int(resolve.decided.receipt.version), [_given(resolve)]))

    def values(
        self, decided: Decided, parts: Sequence[tuple[Segment, Tensor]], fresh: Sequence[int]
    ) -> Entry | None:
        """The record of uploaded values, which make a version."""
        if self.journal is None:
            return None
        message = JournalValues(segments=[segment for segment, _ in parts], fresh=fresh)
        record = self._record(int(decided.receipt.version), [(decided, None)], values=message)
        return Entry(self.journal, record, [values for _, values in parts])

    def extras(self, file: Tensor, *, are_all: bool) -> Entry | None:
        """The record of buffers that were uploaded as a safetensors file."""
        if self.journal is None:
            return None
        message = JournalExtras(file_bytes=file.numel(), all=are_all)
        record = self._record(self._model.commits.version, (), extras=message)
        # a copy: the upload's memory is given back before the writer comes to it
        return Entry(self.journal, record, [file.clone()])

    def failure(self, version: int, error: PushstepError) -> Entry | None:
        """The record that the step of an earlier record has failed and moved nothing."""
        if self.journal is None:
            return None
        return Entry(self.journal, self._record(version, (), failure=failure_message(error)))

    def change(self) -> Entry | None:
        """The record of what else has changed since the last one. None if nothing has."""
        if self.journal is None:
            return None
        record = self._record(self._model.commits.version, (), rows=True)
        return Entry(self.journal, record) if record.changed else None

    def not_written(self, entry: Entry) -> None:
        """A record could not be written. The next one says the same, but for its step, which was refused."""
        rows = json.loads(entry.record.changed or b"{}").get("workers", {})
        of_outcomes = [outcome.receipt.identity.worker for outcome in entry.record.outcomes]
        self._model.sessions.mark_changed(*rows, *of_outcomes)
        self.forget()

    def _record(
        self,
        version: int,
        given: Sequence[Given],
        *,
        rows: bool = False,
        hooks: Sequence[Mapping[str, Any]] | None = None,
        **change: Any,
    ) -> JournalRecord:
        """A record. `rows`: with the worker table's, which are of the end of what was decided together.

        hooks: as they are after this step; None for as they are now.
        """
        workers = self._model.sessions.workers
        return JournalRecord(
            timeline=self._model.commits.timeline,
            version=version,
            outcomes=[
                outcome_message(decided, state, workers[decided.receipt.identity.worker].refused_in_row)
                for decided, state in given
            ],
            changed=self._changed(hooks, is_step="step" in change, rows=rows),
            **change,
        )

    def _changed(self, hooks: Sequence[Mapping[str, Any]] | None, *, is_step: bool, rows: bool) -> bytes:
        """As JSON, the entries of the manifest that no record has said yet. `is_step`: the receipts hold the values."""
        found: dict[str, Any] = {}
        for name, now in self._now(hooks).items():
            if self._said.get(name) != now:
                found[name] = self._said[name] = now
        groups = self._model.commits.groups
        held = [(group.values, frozenset(group.pinned), group.frozen) for group in groups.list]
        said = [said[1:] for said in self._said_groups] == [now[1:] for now in held] and (
            is_step or all(a[0] is b[0] for a, b in zip(self._said_groups, held, strict=True))
        )
        if not said:
            found["groups"] = groups.dump()
        self._said_groups = list(held)
        if rows and (changed := self._model.sessions.take_changed()):
            found["workers"] = changed
        return json.dumps(found).encode() if found else NOTHING

    def _now(self, hooks: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
        model = self._model
        now: dict[str, Any] = {
            "edit": model.edit,
            "revisions": model.revisions.known,
            "gate": model.coordinator.gate.dump(),
            "forgotten_epoch": model.sessions.forgotten_epoch,
        }
        now["hooks"] = list(model.commits.hooks.dump() if hooks is None else hooks)
        for name, settings in (
            ("policy", model.coordinator.policy.settings),
            ("durability", model.durability),
        ):
            if self._said_settings.get(name) is not settings:
                self._said_settings[name] = settings
                now[name] = settings.model_dump(mode="json")
        return now

    # Waiting.

    def when_safe(self, number: int, level: Level, then: Callable[[], None]) -> None:
        """Call `then` once record `number` is as safe as a level says: at once, unless that is `durable`."""
        journal = self.journal
        if journal is None:
            then()
            return
        if level is not Level.DURABLE:
            self._sync.request(journal, self._synced(journal))
            then()
        elif number <= journal.note_durable():
            then()
        else:
            self._sync.request(journal, self._synced(journal))
            self._waiting.append((number, then))

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
        if self.level is not Level.APPLIED:
            await self.drained()

    async def appended(self) -> int:
        """The number of the newest record, once everything decided so far is in the journal."""
        return await self._model.writer.submit(lambda: self.number, reads=False)

    async def drained(self) -> int:
        """The same, once it is on the disk, too, if the level is `durable`."""
        number = await self.appended()
        safe: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.when_safe(number, self.level, partial(_set, safe))
        await safe
        return number

    def let_readers_go(self) -> None:
        """Wait no more for versions of a timeline that has ended."""
        waiting, self._versions = self._versions, []
        for _, waits in waiting:
            _set(waits)

    def _synced(self, journal: Journal) -> Callable[[], None]:
        loop = asyncio.get_running_loop()

        def synced() -> None:
            loop.call_soon_threadsafe(self.note_durable, journal)

        return synced

    def note_durable(self, journal: Journal) -> None:
        """Call what has waited for records that are on the disk now."""
        if journal is not self.journal:
            return
        number = journal.note_durable()
        while self._waiting and self._waiting[0][0] <= number:
            then = self._waiting.popleft()[1]
            try:
                then()
            except Exception:  # the others wait, too
                log.exception("a push could not be answered")
        version, waiting = journal.durable_version, self._versions
        self._versions = [(at, waits) for at, waits in waiting if at > version]
        for at, waits in waiting:
            if at <= version:
                _set(waits)
        if self._waiting and journal.is_based:
            self._sync.request(journal, self._synced(journal))

    def _let_go(self) -> None:
        """Do everything that waits."""
        while self._waiting:
            self._waiting.popleft()[1]()
        self.let_readers_go()


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _given(resolve: Resolve) -> Given:
    header = resolve.pending.header
    if resolve.decided is None:
        raise ValueError("a push without an outcome is in no record")
    return resolve.decided, header.worker_state if header.HasField("worker_state") else None
