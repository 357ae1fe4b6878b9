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
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from pushstep.proto.errors import (
    Draining,
    InvalidHyperparameter,
    ModelFailed,
    ModelLost,
    OverCapacity,
    PushstepError,
    StepFailed,
)
from pushstep.proto.errors.status import untrace
from pushstep.proto.types_pb2 import Identity, Receipt
from pushstep.proto.wire.layout import Layout

from ..arenas.arena import Arenas, ArenasCopy
from ..arenas.extras import Extras
from ..arenas.publisher import Publisher
from ..arenas.writer import ModelWriter
from ..coordinator import admission as admission
from ..coordinator.commits import Commits
from ..coordinator.coordinator import Coordinator
from ..coordinator.groups import Group, ParamGroups
from ..coordinator.hooks.chain import HookChain
from ..coordinator.hooks.hook import Hook, Point
from ..coordinator.policies.policy import PolicySettings
from ..coordinator.policies.synchronous import SyncSettings
from ..coordinator.sessions import Sessions
from ..coordinator.worker import WorkerState
from ..devices.device import Device
from ..process.logs import in_short
from ..staging.budget import Budget
from ..staging.read_budget import ReadBudget
from ..storage.saved_state import SavedState
from .events import Events
from .executor import Executor
from .observers import Observers

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
    ) -> None:
        self.name = name
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
        # edits (hyperparameters, hooks, policy) add no version: (version, this number) identifies each
        self.edit = 0
        self.failed: ModelFailed | None = None
        # called when a write has left the arenas torn
        self.on_failed: Callable[[Model], None] = lambda model: None
        self.deleted = False
        # nothing is decided or stepped any more: the next start continues from the present state
        self.ended = False
        self.extras = Extras()
        self._extras_seen = 0
        self.events = Events()
        self.last_receipt: Receipt | None = None
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
        self.publisher = Publisher(self.arenas, self.writer, reading)
        self.executor = Executor(
            self.coordinator, self.arenas, self.writer, staging, device.device_stream(), self
        )

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
        return Arenas.bytes_charged(self.layout) + self.extras.nbytes

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
        if self.failed is not None:
            raise copy.copy(
                self.failed
            )  # the traceback of a shared one would keep each refused push in memory

    def require_here(self) -> None:
        """Raise ModelLost once it is deleted, Draining once the server saves it for the last time."""
        if self.ended:
            raise Draining()
        if self.deleted:
            raise ModelLost(model=self.name)

    def has_live(self, identity: Identity, now_s: float) -> bool:
        """True if a session is still a member: nothing has ended its epoch, and its lease runs."""
        worker = self.sessions.workers.get(identity.worker)
        return (
            not self.deleted
            and identity.timeline == self.timeline
            and worker is not None
            and worker.epoch == identity.epoch
            and worker.state is WorkerState.LIVE
            and now_s <= worker.lease_until_s
        )

    def require_room_for(self, worker: str) -> None:
        """OverCapacity if a round with one more worker does not fit in the staging budget."""
        self.sessions.expire(time.monotonic())
        known = self.sessions.workers.get(worker)
        is_live = known is not None and known.state is WorkerState.LIVE
        self._require_round_fits(self.coordinator.policy.settings, self.sessions.live_count() + (not is_live))

    def _require_round_fits(self, settings: PolicySettings, workers: int) -> None:
        """OverCapacity if a round does not fit: it holds all pushes until the last, and then their sum."""
        if not isinstance(settings, SyncSettings):
            return
        gradient_bytes = sum(arena.elements * arena.dtype.itemsize for arena in self.layout.arenas)
        buffers = max(workers, settings.min_workers) + 1
        if buffers * gradient_bytes > self.staging.total_bytes:
            raise OverCapacity(
                problem=f"a round of {buffers - 1} workers holds {buffers} buffers of {gradient_bytes} bytes, staging "
                f"has {self.staging.total_bytes}",
                setting="staging-bytes",
            )

    def broke_off(self, problem: BaseException, version: int) -> PushstepError:
        """The error for the pushes of a step that failed. If it had begun to write, the model fails too."""
        if isinstance(problem, PushstepError):
            untrace(problem)
            return copy.copy(problem)
        log.error("model %s: the step to version %d failed", self.name, version, exc_info=problem)
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
                log.warning(
                    "model %s: %d parameters are NaN or infinite: %s", self.name, len(found), found[0]
                )

    # Edits. Each returns the first version that it applies to.

    async def try_group(self, index: int, values: Mapping[str, Any]) -> None:
        """InvalidHyperparameter if a step with these values would make parameters NaN or infinite."""
        changed = self.groups.changed(index, values, self.name)
        if not await self.writer.submit(lambda: self.arenas.stays_finite(index, changed)):
            raise InvalidHyperparameter(
                problem=f"{dict(values)}: the next step would make NaN or infinity of parameters of group {index}"
            )

    def patch_group(self, index: int, values: Mapping[str, Any], hold: bool, by: str) -> tuple[Group, int]:
        """Change a group's hyperparameters from the next version on."""
        group = self.groups.patch(index, values, hold, self.name)
        return group, self._edited("param_group_changed", by, group=index, values=dict(values), hold=hold)

    def add_hook(
        self, name: str, point: str, settings: Mapping[str, Any], prepend: bool, by: str
    ) -> tuple[Hook, int]:
        """Install a hook from the next version on."""
        hook = self.hooks.add(name, point, settings, self.groups, self.name, prepend)
        return hook, self._edited("hook_added", by, hook=hook.hook_id, point=point)

    def remove_hook(self, hook_id: str, by: str) -> int:
        """Remove a hook from the next version on."""
        self.hooks.remove(hook_id, self.groups, self.name)
        return self._edited("hook_removed", by, hook=hook_id)

    def begin_under(self, settings: PolicySettings) -> None:
        """Set the policy that the model is created with. OverCapacity if a round does not fit."""
        self._require_round_fits(settings, 0)
        self.coordinator.switch(settings, time.monotonic())

    def set_policy(self, settings: PolicySettings, by: str) -> int:
        """Use another policy or other settings from the next version on. OverCapacity as `begin_under`."""
        self._require_round_fits(settings, self.sessions.live_count())
        decisions = self.coordinator.switch(settings, time.monotonic())
        version = self._edited("policy_changed", by, **settings.model_dump(mode="json"))
        self.executor.apply(decisions)
        return version

    def set_gate(self, settings: admission.GateSettings, by: str) -> int:
        """Change the settings of the gate."""
        self.coordinator.admission.settings = settings
        return self._edited("gate_changed", by, **settings.model_dump(mode="json"))

    def evict(self, worker: str, by: str) -> int:
        """Fence a worker."""
        decisions = self.coordinator.evicted(worker, time.monotonic())
        version = self._edited("worker_evicted", by, worker=worker)
        self.executor.apply(decisions)
        return version

    def release(self, worker: str, by: str) -> int:
        """Let a worker out of quarantine."""
        decisions = self.coordinator.released(worker, time.monotonic())
        version = self._edited("worker_released", by, worker=worker)
        self.executor.apply(decisions)
        return version

    def _edited(self, kind: str, by: str, **facts: Any) -> int:
        self.edit += 1
        self.record(kind, by, **facts)
        return self.version + 1

    def record(self, kind: str, by: str, **facts: Any) -> None:
        """Note an event: who did what, after which version."""
        self.events.note(
            {
                "time": time.time(),
                "kind": kind,
                "by": by,
                "timeline": self.timeline,
                "version": self.version,
                "edit": self.edit,
                **facts,
            }
        )

    # Replacing what the model is.

    def replace_extras(self, extras: Extras) -> None:
        """Replace the buffers and frozen values. This adds no version."""
        self.extras = extras
        self._extras_seen += 1

    def adopt(self, saved: SavedState) -> None:
        """Take over a snapshot's groups, hooks, gate, extras and number of edits."""
        self.groups.become(saved.groups)
        self.hooks.become(saved.hooks)
        self.coordinator.admission = saved.admission
        self.extras = saved.copy.extras
        self.edit = saved.edit

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
            for group, before in zip(saved.groups.list, self.groups.list, strict=False):
                group.revision = before.revision + 1
            self.adopt(saved)
        self.failed = None
        self.replaced_by = None  # that upload is undone
        self.extras = copy.extras
        decisions = self.coordinator.restored(copy.lineage_here, timeline, settings, time.monotonic())
        self.record("restored", by)
        self.executor.apply(decisions)
        arenas, publisher = self.arenas, self.publisher

        def load() -> None:
            arenas.load(copy, timeline)
            publisher.forget()

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
            "policy": self.coordinator.policy.settings.model_dump(mode="json"),
            "gate": self.coordinator.admission.dump(),
            "groups": self.groups.dump(),
            "hooks": self.hooks.dump(),
            "workers": self.sessions.dump(),
            "forgotten_epoch": self.sessions.forgotten_epoch,
        }

    def end(self) -> None:
        """Decide and step nothing more. ModelFailed if a write has left it between two versions."""
        self.require_whole()
        self.ended = True
        self.executor.close()

    async def copy(self, *, last: bool = False) -> tuple[dict[str, Any], ArenasCopy]:
        """Groups, hooks and workers, with the arenas of exactly the same version. OutOfMemory.

        `last`: the model has ended, so the arenas themselves serve as the copy where they lie on the CPU.
        """
        if not last:
            self.require_whole()
        facts, extras, lineage = self.dump(), self.extras, tuple(self.commits.lineage)
        copy = await self.writer.submit(self.arenas.as_copy if last else self.arenas.copy)
        return facts, replace(copy, extras=extras, lineage=lineage)

    def tell(self, point: Point, **facts: Any) -> None:
        """Queue an event for the observers at a point."""
        observers = self.hooks.observers(point)
        if observers:
            now = {"model": self.name, "timeline": self.timeline, "version": self.version}
            self.observers.tell(observers, {**now, **facts})

    async def close(self) -> None:
        """Finish what is queued and end the model's threads."""
        self.executor.close()
        await self.writer.close()
        await self.executor.give_back()
        self.observers.close()


def _hook_failed(hook: Hook, version: int, error: Exception) -> None:
    log.warning("hook %s failed at version %d: %s", hook.hook_id, version, error)
