"""One model: its rooms, and the edits that operators and restores make to them.

Everything here runs on the event loop and is synchronous between two awaits, so the order in which these methods
are called is the model's history. `version` is the last one that a ticket was written for; the arenas reach it
when the stepper has worked through its queue.
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
from pushstep.proto.layout import Layout
from pushstep.proto.status import untrace
from pushstep.proto.types_pb2 import GroupValues, Identity, Receipt

from . import policies, quality
from .arena import Arenas, ArenasCopy
from .device import Device
from .events import Events
from .executor import Executor
from .extras import Extras
from .groups import Group, ParamGroups
from .hooks.chain import HookChain
from .hooks.hook import Hook, Point
from .judge import Judge
from .ledger import Ledger
from .policy import PolicySettings
from .publish import Publisher
from .quality import Quality
from .read_budget import ReadBudget
from .session import Sessions
from .staging import Budget
from .stepper import Stepper
from .sync_round import SyncSettings
from .worker import WorkerState

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
        self.hooks = HookChain()
        self.ledger = Ledger(name, timeline, groups, self.hooks)
        self.judge = Judge(uid, self.ledger, sessions)
        # the (timeline, version) at which this process took it over from another; None if it was made here
        self.begun_at: tuple[int, int] | None = None
        # edits (hyperparameters, hooks, policy) add no version: each is (after this version, this number)
        self.edit = 0
        self.failed: ModelFailed | None = None
        # told when a write has left the arenas torn
        self.on_failed: Callable[[Model], None] = lambda model: None
        self.deleted = False
        # nothing is decided or stepped any more: what it is now is what the next start has
        self.ended = False
        self.extras = Extras()
        self._extras_seen = 0
        self.events = Events()
        self.last_receipt: Receipt | None = None
        # whose upload replaced the optimizer state last, so that its retry is answered and not refused
        self.replaced_by: Identity | None = None
        # names of parameters with NaN or infinity, as the writer has found them
        self.nonfinite: Sequence[str] = ()
        self.device = device
        self.arenas = Arenas(layout, device)
        self.arenas.timeline = timeline
        self.stepper = Stepper(name, self.arenas)
        # held while rows are gathered for a reader: a step waits for one reader at most
        self.gathering = asyncio.Lock()
        self.publisher = Publisher(self.arenas, self.stepper, reading)
        self.executor = Executor(self)

    @property
    def version(self) -> int:
        """The last one that a ticket was written for."""
        return self.ledger.version

    @property
    def timeline(self) -> int:
        """Grows with each restore."""
        return self.ledger.timeline

    @property
    def held_bytes(self) -> int:
        """What it counts for, of --max-bytes."""
        return Arenas.bytes_charged(self.layout) + self.extras.nbytes

    @property
    def content(self) -> Hashable:
        """What a copy of it now would be of: equal for equal copies only."""
        return self.uid, self.timeline, self.version, self.edit, self._extras_seen

    def require_current(self, identity: Identity) -> None:
        """ModelLost, Superseded or ModelFailed unless `identity` is of this model on this timeline."""
        self.judge.require_current(identity)
        self.require_whole()

    def require_whole(self) -> None:
        """What `require_here` raises; ModelFailed while a broken-off write has left it between two versions."""
        self.require_here()
        if self.failed is not None:
            raise copy.copy(self.failed)  # its traceback would keep what was refused with it

    def require_here(self) -> None:
        """ModelLost once it is deleted; Draining once the server saves it for the last time."""
        if self.ended:
            raise Draining()
        if self.deleted:
            raise ModelLost(model=self.name)

    def require_room_for(self, worker: str) -> None:
        """OverCapacity if a round with one worker more could not be held."""
        self.sessions.expire(time.monotonic())
        known = self.sessions.workers.get(worker)
        is_live = known is not None and known.state is WorkerState.LIVE
        self._require_round_fits(self.judge.policy.settings, self.sessions.live_count() + (not is_live))

    def _require_round_fits(self, settings: PolicySettings, workers: int) -> None:
        """A round holds every push until the last one is there, and then their sum."""
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
        """A step could not be taken: what its pushes are told. If it had begun to write, the model is failed as well."""
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
        """Take nothing more until a restore replaces the arenas, if a write has left them between two versions."""
        if self.arenas.torn and self.failed is None:
            self.failed = ModelFailed(model=self.name, version=self.version, problem=in_short(problem))
            self.record("failed", "server", problem=in_short(problem))
            self.on_failed(self)

    def note_nonfinite(self) -> None:
        """Tell of parameters that have become NaN or infinite, or are finite again."""
        found = self.arenas.watch.nonfinite
        if found is not self.nonfinite:
            self.nonfinite = found
            kind = "parameters_nonfinite" if found else "parameters_finite"
            self.record(kind, "server", parameters=list(found[:NAMES_SHOWN]), count=len(found))
            if found:
                log.warning(
                    "model %s: %d parameters are NaN or infinite: %s", self.name, len(found), found[0]
                )

    # Edits. Each returns the version from which it holds.

    async def try_group(self, index: int, values: Mapping[str, Any]) -> None:
        """InvalidHyperparameter for values with which a step would make NaN or infinity of what the group holds."""
        changed = self.groups.changed(index, values, self.name)
        if not await self.stepper.submit(lambda: self.arenas.stays_finite(index, changed)):
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
        """Take a hook out from the next version on."""
        self.hooks.remove(hook_id, self.groups, self.name)
        return self._edited("hook_removed", by, hook=hook_id)

    def begin_under(self, settings: policies.Settings) -> None:
        """The policy that it is created with."""
        self._require_round_fits(settings, 0)
        self.judge.switch(settings, time.monotonic())

    def set_policy(self, settings: policies.Settings, by: str) -> int:
        """Decide by another policy, or by other settings of this one, from the next version on."""
        self._require_round_fits(settings, self.sessions.live_count())
        decisions = self.judge.switch(settings, time.monotonic())
        version = self._edited("policy_changed", by, **settings.model_dump(mode="json"))
        self.executor.carry_out(decisions)
        return version

    def set_quality(self, settings: quality.QualitySettings, by: str) -> int:
        """Have the gate let other pushes in."""
        self.judge.quality.settings = settings
        return self._edited("gate_changed", by, **settings.model_dump(mode="json"))

    def evict(self, worker: str, by: str) -> int:
        """Fence a worker."""
        decisions = self.judge.evicted(worker, time.monotonic())
        version = self._edited("worker_evicted", by, worker=worker)
        self.executor.carry_out(decisions)
        return version

    def release(self, worker: str, by: str) -> int:
        """Let a worker out of quarantine."""
        decisions = self.judge.released(worker, time.monotonic())
        version = self._edited("worker_released", by, worker=worker)
        self.executor.carry_out(decisions)
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
        """Hold other buffers and frozen values. They are of no version."""
        self.extras = extras
        self._extras_seen += 1

    def restore(
        self, copy: ArenasCopy, saved: Mapping[str, Any] | None, timeline: int, by: str
    ) -> asyncio.Future[None]:
        """Become `copy` on a new, already durable timeline; `saved` is the snapshot's groups and hooks.

        All epochs close: a push of the old timeline, one that waits too, is told `superseded`. What is saved is read
        before anything changes; it holds from the next ticket on, and the future tells when the arenas are there.
        """
        held = self.judge.policy.settings.model_dump() if saved is None else saved["policy"]
        settings = policies.read(held)
        if saved is not None:
            groups = ParamGroups.parse(saved["groups"])
            hooks = self.hooks.parsed(saved["hooks"], groups, self.name)
            gate = Quality.parsed(saved["gate"])
            for group, before in zip(groups.list, self.groups.list, strict=False):
                group.revision = before.revision + 1
            self.groups.become(groups)
            self.hooks.list[:] = hooks
            self.judge.quality = gate
            self.edit = int(saved["edit"])
        self.failed = None
        self.replaced_by = None  # what it replaced is undone
        self.extras = copy.extras
        decisions = self.judge.restored(copy.lineage_here, timeline, settings, time.monotonic())
        self.record("restored", by)
        self.executor.carry_out(decisions)
        arenas, publisher = self.arenas, self.publisher

        def load() -> None:
            arenas.load(copy, timeline)
            publisher.forget()

        loading = self.stepper.write(load, mends=True)
        loading.add_done_callback(lambda _: self.note_nonfinite())
        return loading

    def add_groups(self, extension: ArenasCopy, added: list[Group]) -> asyncio.Future[None]:
        """Take on further groups at the end: their arenas are in `extension`, values and all."""
        self.layout = extension.layout
        self.groups.list.extend(added)

        def adopt() -> None:
            self.arenas.adopt(extension)
            self.publisher.forget()  # the version stays, its frames lack the groups

        return self.stepper.write(adopt)

    # What snapshots hold.

    def dump(self) -> dict[str, Any]:
        """Everything but the arenas, as JSON, at this moment's version: it stays so while training goes on."""
        return {
            "model": self.name,
            "uid": self.uid.hex(),
            "timeline": self.timeline,
            "version": self.version,
            "edit": self.edit,
            "policy": self.judge.policy.settings.model_dump(mode="json"),
            "gate": self.judge.quality.dump(),
            "groups": self.groups.dump(),
            "hooks": self.hooks.dump(),
            "workers": self.sessions.dump(),
            "forgotten_epoch": self.sessions.forgotten_epoch,
        }

    def end(self) -> None:
        """Decide and step nothing more. ModelFailed if it is not whole."""
        self.require_whole()
        self.ended = True
        self.executor.close()

    async def copy(self, *, last: bool = False) -> tuple[dict[str, Any], ArenasCopy]:
        """Groups, hooks and workers with the arenas of exactly the same version.

        `last`: of a model that has ended, where the arenas themselves do for a copy. OutOfMemory.
        """
        if not last:
            self.require_whole()
        facts, extras, lineage = self.dump(), self.extras, tuple(self.ledger.lineage)
        copy = await self.stepper.submit(self.arenas.as_copy if last else self.arenas.copy)
        return facts, replace(copy, extras=extras, lineage=lineage)

    def tell(self, point: Point, **facts: Any) -> None:
        """Let the observers at a point know."""
        version, timeline = self.version, self.timeline
        self.hooks.tell(
            point, lambda: {"model": self.name, "timeline": timeline, "version": version, **facts}
        )

    def group_values(self) -> list[GroupValues]:
        """Every group as it stands."""
        return self.groups.messages()

    async def close(self) -> None:
        """Finish what is queued and end the model's threads."""
        self.executor.close()
        await self.stepper.close()
        await self.executor.give_back()
        self.hooks.close()


def in_short(problem: BaseException) -> str:
    """A defect in one line, for those who are told of it; the log has all of it."""
    return f"{type(problem).__name__}: {problem}"[:200]
