"""One model: its parts, and the edits that operators and restores make to them.

Everything here runs on the event loop and is synchronous between two awaits, so the order in which these methods
are called is the model's history. `version` is the last one that a ticket was written for. The arenas reach it when
the writer has worked through its queue.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any, Final

from torch import Tensor

from pushstep.proto.errors import Draining, ModelFailed, ModelLost, PushstepError, StepFailed
from pushstep.proto.errors.status import untrace
from pushstep.proto.types_pb2 import Identity, Receipt
from pushstep.proto.wire.layout import Layout

from ..arenas.arena import Arenas
from ..arenas.arenas_copy import ArenasCopy
from ..arenas.averages import Averages
from ..arenas.extras import Extras
from ..arenas.publisher import Publisher
from ..arenas.writer import ModelWriter
from ..captures.capture import Capture
from ..coordinator.commits import Commits, Revisions
from ..coordinator.coordinator import Coordinator
from ..coordinator.groups import Group, ParamGroups
from ..coordinator.hooks.chain import HookChain
from ..coordinator.hooks.hook import Hook, Point
from ..coordinator.policies.policy import PolicySettings, require_gradients_fit
from ..coordinator.sessions import Sessions
from ..coordinator.worker import WorkerState, put_outcomes
from ..counters.model_counts import ModelCounts
from ..devices.device import Device
from ..journal.durability import DurabilitySettings, read_durability
from ..journal.recorder import Recorder
from ..journal.sync import JournalSync
from ..observers.observers import Observers
from ..parts.shard import ModelShard
from ..process.logs import in_short
from ..process.threads import DISK
from ..staging.budget import Budget
from ..staging.read_budget import ReadBudget
from ..storage.chains import Base
from ..storage.model_folder import IdentityFile
from ..storage.saved_state import SavedState
from .events import Events
from .executor import Executor
from .held_pushes import HeldPushes

log = logging.getLogger("pushstep.model")
NAMES_SHOWN: Final = 10


class Model:
    """A named set of parameters with its groups, state, hooks, policy, workers and version."""

    def __init__(
        self,
        name: str,
        uid: bytes,
        timeline: int,
        layout: Layout,
        groups: ParamGroups,
        sessions: Sessions,
        device: Device,
        staging: Budget,
        reading: ReadBudget,
        journal_sync: JournalSync,
        durability: DurabilitySettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._log = logging.LoggerAdapter(log, {"model": name})
        self.clock = clock
        self.staging = staging
        self.uid = uid
        self.layout = layout
        self.groups = groups
        self.sessions = sessions
        self.hooks = HookChain(_hook_failed)
        self.observers = Observers()
        self.commits = Commits(name, timeline, groups, self.hooks)
        self.coordinator = Coordinator(uid, self.commits, sessions)
        # the (timeline, version) at which this process loaded it; None if it was created here
        self.begun_at: tuple[int, int] | None = None
        # of a model that lies in several ranks; `layout` is then of this rank's part
        self.shard: ModelShard | None = None
        # edits (hyperparameters, hooks, policy) add no version: (version, this number) identifies each
        self.edit = 0
        self.revisions = Revisions()
        self.failed: ModelFailed | None = None
        # called when a write has left the arenas torn
        self.on_failed: Callable[[Model], None] = lambda _: None
        self.deleted = False
        # nothing is decided or stepped any more: the next start continues from the present state
        self.ended = False
        self.extras = Extras()
        self._extras_seen = 0
        self.events = Events()
        self.counts = ModelCounts()
        self.last_receipt: Receipt | None = None
        self.durability = durability
        # what is on the disk of who it is; of what, and since when, the newest snapshot is; and when one was last begun
        self.kept = IdentityFile(uid, timeline, None, ())
        self.saved: Hashable = None
        self.saved_s = self.clock()
        self.base: Base | None = None
        self.tried_s = 0.0
        # the last upload that replaced the optimizer state: its retry is answered and not refused
        self.replaced_by: Identity | None = None
        # names of parameters with NaN or infinity, as the writer has found them
        self.nonfinite: Sequence[str] = ()
        self.device = device
        self.arenas = Arenas(layout, device)
        self.arenas.timeline = timeline
        self.writer = ModelWriter(name, self.arenas)
        # held while rows are gathered for a reader, so a step waits for one reader at most
        self.gathering = asyncio.Lock()
        self.publisher = Publisher(self.arenas, self.writer, reading, clock)
        self.recorder = Recorder(self, journal_sync)
        self.held = HeldPushes(self.coordinator, self.require_whole, clock)
        args = self.coordinator, self.arenas, self.writer, staging, device.device_stream()
        self.executor = Executor(*args, self.recorder, self.held, self, clock)

    @property
    def version(self) -> int:
        """The last version that a ticket was written for."""
        return self.commits.version

    @property
    def timeline(self) -> int:
        """The current timeline. It grows with each restore."""
        return self.commits.timeline

    @property
    def held_bytes(self) -> int:
        """Bytes of --max-bytes that it takes."""
        averages_bytes = Averages.bytes_needed(self.layout, self.hooks.averages())
        return Arenas.bytes_charged(self.layout) + averages_bytes + self.extras.nbytes

    @property
    def content(self) -> Hashable:
        """A key of what the model holds now: copies with equal keys are equal."""
        return self.uid, self.timeline, self.version, self.edit, self._extras_seen

    def require_current(self, identity: Identity) -> None:
        """ModelLost, Superseded or ModelFailed unless `identity` is of this model on this timeline."""
        self.coordinator.require_current(identity)
        self.require_whole()

    def require_whole(self) -> None:
        """Raise what `require_here` raises; ModelFailed while a write has left it between two versions."""
        self.require_here()
        self.require_steppable()

    def require_steppable(self) -> None:
        """ModelLost, ModelFailed. What was decided before the end is stepped still: the last snapshot holds it."""
        if self.deleted:
            raise ModelLost(model=self.name)
        if self.failed is not None:
            raise copy.copy(self.failed)  # the traceback of a shared one would keep each refused push

    def require_here(self) -> None:
        """Raise ModelLost once it is deleted, Draining once the server saves it for the last time."""
        if self.ended:
            raise Draining()
        if self.deleted:
            raise ModelLost(model=self.name)

    def has_live(self, identity: Identity, now_s: float) -> bool:
        """True if a session is still a member: nothing has ended its epoch, and its lease runs."""
        return not self.deleted and self.coordinator.has_live(identity, now_s)

    def require_room_for(self, worker: str) -> None:
        """OverCapacity if what the policy keeps does not fit in the staging budget with one more worker."""
        self.sessions.expire(self.clock())
        known = self.sessions.workers.get(worker)
        is_live = known is not None and known.state is WorkerState.LIVE
        workers = self.sessions.live_count() + (not is_live)
        self.require_gradients_fit(self.coordinator.policy.settings, workers)

    def require_gradients_fit(self, settings: PolicySettings, workers: int) -> None:
        """OverCapacity if what a policy keeps of so many workers does not fit in the staging budget."""
        gradient_bytes = sum(arena.elements * arena.dtype.itemsize for arena in self.layout.arenas)
        require_gradients_fit(settings, workers, gradient_bytes, self.staging.total_bytes)

    def broke_off(self, problem: BaseException, version: int) -> PushstepError:
        """The error for the pushes of a step that failed. If it had begun to write, the model fails too."""
        if isinstance(problem, PushstepError):
            untrace(problem)
            return copy.copy(problem)
        self._log.error("model %s: the step to version %d failed", self.name, version, exc_info=problem)
        failure = StepFailed(model=self.name, version=version, problem=in_short(problem))
        self.record(failure.code, "server", step=version, problem=in_short(problem))
        self.fail_if_torn(problem)
        untrace(problem)
        return failure

    def fail_if_torn(self, problem: BaseException) -> None:
        """If a write has left the arenas torn, take nothing more until a restore replaces them."""
        if self.arenas.torn and self.failed is None:
            self.failed = ModelFailed(model=self.name, version=self.version, problem=in_short(problem))
            self.record("failed", "server", problem=in_short(problem))
            self.on_failed(self)

    def note_nonfinite(self) -> None:
        """Record an event if parameters have become NaN or infinite, or are finite again."""
        found = self.arenas.watch.nonfinite
        if found is not self.nonfinite:
            self.nonfinite = found
            kind = "parameters_nonfinite" if found else "parameters_finite"
            self.record(kind, "server", parameters=list(found[:NAMES_SHOWN]), count=len(found))
            if found:
                many = "model %s: %d parameters are NaN or infinite: %s"
                self._log.warning(many, self.name, len(found), found[0])

    def begin_under(self, settings: PolicySettings) -> None:
        """Set the policy that the model is created with. OverCapacity if what it keeps does not fit."""
        self.require_gradients_fit(settings, 0)
        self.coordinator.switch(settings, self.clock())

    def record(self, kind: str, by: str, **facts: Any) -> None:
        """Note an event: who did what, after which version."""
        at = {"timeline": self.timeline, "version": self.version, "edit": self.edit}
        self.events.record(kind, by, {**at, **facts})

    # Replacing what the model is.

    def replace_extras(self, extras: Extras, file: Tensor, *, are_all: bool) -> None:
        """Replace the buffers and frozen values, which came in a safetensors file. This adds no version."""
        self.extras = extras
        self._extras_seen += 1
        self.executor.record(self.recorder.extras(file, are_all=are_all))

    def adopt(self, saved: SavedState) -> None:
        """Take over a snapshot's groups, hooks, gate, extras and number of edits."""
        self.groups.become(saved.groups)
        self.hooks.become(saved.hooks)
        self.observers.keep(self.hooks.list)
        self.coordinator.gate = saved.gate
        self.extras = saved.copy.extras
        self.edit = saved.edit
        self.revisions = Revisions(saved.revisions)

    def load(self, saved: SavedState, timeline: int) -> None:
        """Become what a snapshot holds, before anything else uses the model. It blocks."""
        copy = saved.copy
        self.commits.version, self.commits.lineage = copy.version, list(copy.lineage)
        if timeline != copy.timeline:
            self.commits.go_back(copy.lineage_here, timeline)
        self.adopt(saved)
        if saved.durability is not None:
            self.durability = read_durability(saved.durability, self.durability)
        self.sessions.parse(saved.workers, self.clock(), saved.forgotten_epoch)
        self.sessions.first_epoch = saved.first_epoch
        # without the check that a round fits in staging: a smaller budget must not keep the model from loading
        self.coordinator.switch(saved.policy, self.clock())
        self.arenas.load(copy, timeline, self.hooks.averages())

    def restore(
        self, copy: ArenasCopy, saved: SavedState | None, timeline: int, by: str
    ) -> asyncio.Future[None]:
        """Become `copy` on a new timeline that is on disk already.

        `saved`: the snapshot that `copy` is of; None keeps groups, hooks, policy and gate. It applies from the next
        ticket on. All epochs close: a push of the old timeline, also a pending one, gets `superseded`. The future is
        done when the arenas are loaded.
        """
        settings = self.coordinator.policy.settings if saved is None else saved.policy
        if saved is not None:
            self.adopt(saved)
        self.failed = None
        self.replaced_by = None  # that upload is undone
        self.extras = copy.extras
        workers = () if saved is None else saved.workers
        decisions = self.coordinator.restored(copy.lineage_here, timeline, settings, self.clock(), workers)
        self.record("restored", by)
        self.recorder.let_readers_go()
        self.executor.apply(decisions)
        # of a snapshot it is on the disk; a journal goes on from it only behind the next snapshot
        is_kept = saved is not None and self.recorder.journal is None
        averages = self.hooks.averages()

        def load() -> None:
            self.arenas.load(copy, timeline, averages)
            self.publisher.forget()
            self.recorder.skip(copy.version if is_kept else copy.version - 1)

        loading = self.writer.write(load, mends=True)
        loading.add_done_callback(lambda _: self.note_nonfinite())
        return loading

    def add_groups(self, extension: ArenasCopy, added: list[Group]) -> asyncio.Future[None]:
        """Add groups at the end. `extension` has their arenas, with values."""
        self.layout = extension.layout
        self.groups.list.extend(added)

        def adopt() -> None:
            self.arenas.adopt(extension)
            self.publisher.forget()  # the version stays the same, but its frames lack the groups
            self.recorder.skip(self.arenas.version)

        return self.writer.write(adopt)

    # What snapshots hold.

    def dump(self) -> dict[str, Any]:
        """Everything but the arenas, as JSON, at the current version. Later training does not change it."""
        return {
            "model": self.name,
            "uid": self.uid.hex(),
            "timeline": self.timeline,
            "version": self.version,
            "edit": self.edit,
            "revisions": self.revisions.known,
            "policy": self.coordinator.policy.settings.model_dump(mode="json"),
            "gate": self.coordinator.gate.dump(),
            "groups": self.groups.dump(),
            "hooks": self.hooks.dump(),
            "workers": self.sessions.dump(),
            "forgotten_epoch": self.sessions.forgotten_epoch,
            "first_epoch": self.sessions.first_epoch,
            "durability": self.durability.model_dump(mode="json"),
        }

    def as_it_is(self) -> tuple[dict[str, Any], ArenasCopy]:
        """What `copy` returns, without a copy: for a model that nobody steps."""
        copy = self.arenas.as_copy()
        return self.dump(), replace(copy, extras=self.extras, lineage=tuple(self.commits.lineage))

    def identity(
        self,
        clean_version: int | None,
        timeline: int | None = None,
        lineage: Sequence[tuple[int, int]] | None = None,
    ) -> IdentityFile:
        """Who the model is, for the disk. `timeline` and `lineage`: those that it is about to have."""
        stands_on = list(self.commits.lineage if lineage is None else lineage)
        at = timeline or self.timeline
        return replace(self.kept, timeline=at, clean_version=clean_version, lineage=stands_on)

    def end(self) -> None:
        """Decide and step nothing more. ModelFailed if a write has left it between two versions."""
        self.require_whole()
        self.ended = True
        self.recorder.give_up()
        self.executor.close()

    async def copy(self) -> tuple[dict[str, Any], ArenasCopy]:
        """Groups, hooks and workers, with a copy of the arenas of exactly the same version. OutOfMemory."""
        self.require_whole()
        facts, extras, lineage = self.dump(), self.extras, tuple(self.commits.lineage)
        under_way = self.executor.under_way()
        copy = await self.writer.submit(self.arenas.copy)
        put_outcomes(facts["workers"], under_way)
        return facts, replace(copy, extras=extras, lineage=lineage)

    async def captured(self, *, last: bool = False) -> tuple[dict[str, Any], Capture]:
        """As `copy`, to be read beside training. Unless it is the `last`, the journal begins a file. StorageFailed."""
        if not last:
            self.require_whole()
        facts, extras, lineage = self.dump(), self.extras, tuple(self.commits.lineage)
        under_way = self.executor.under_way()
        journal = None if last else self.recorder.journal

        def mark() -> tuple[Capture, int]:
            number = self.recorder.number if journal is None else journal.roll()
            return self.arenas.captured(extras, lineage), number

        content, facts["journal"] = await self.writer.submit(mark)
        put_outcomes(facts["workers"], under_way)  # by now their steps are taken, or have failed
        return facts, content

    def tell(self, point: Point, **facts: Any) -> None:
        """Queue an event for the observers at a point."""
        if observers := self.hooks.observers(point):
            now = {"time": time.time(), "model": self.name}
            at = {"timeline": self.timeline, "version": self.version}
            self.observers.tell(observers, {**now, **at, **facts})

    async def close(self) -> None:
        """Finish what is queued and end the model's threads."""
        self.executor.close()
        self.recorder.give_up()
        await self.recorder.close()
        await self.writer.close()
        await self.executor.give_back()
        await DISK.run(self.observers.close)


def _hook_failed(hook: Hook, version: int, error: Exception) -> None:
    log.warning("hook %s failed at version %d: %s", hook.hook_id, version, error)
