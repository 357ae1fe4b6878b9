"""One model: its rooms, and the edits that operators and restores make to them.

Everything here runs on the event loop and is synchronous between two awaits, so the order in which these methods
are called is the model's history. `version` is the last one that a ticket was written for; the arenas reach it
when the stepper has worked through its queue.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch

from pushstep.proto.errors import ModelFailed, ModelLost, PushstepError, Superseded
from pushstep.proto.layout import Layout
from pushstep.proto.types_pb2 import GroupValues, Identity, Receipt

from .arena import Arenas, ArenasCopy
from .groups import Group, ParamGroups
from .hooks.chain import HookChain
from .hooks.hook import Hook, Point
from .policy import AsyncPolicy
from .publish import Publisher
from .session import Sessions
from .stepper import Stepper

EVENTS_KEPT: Final = 1000


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
        device: torch.device,
    ) -> None:
        self.name = name
        self.uid = uid
        self.timeline = timeline
        self.layout = layout
        self.groups = groups
        self.sessions = sessions
        self.hooks = HookChain()
        self.policy = AsyncPolicy()
        self.version = 0
        # edits (hyperparameters, hooks, policy) add no version: each is (after this version, this number)
        self.edit = 0
        self.failed: ModelFailed | None = None
        self.deleted = False
        # a module's buffers and frozen values; replaced as a whole, never written to
        self.extras: Mapping[str, torch.Tensor] = {}
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS_KEPT)
        self._events_seen = 0
        self.last_receipt: Receipt | None = None
        # whose upload replaced the optimizer state last, so that its retry is answered and not refused
        self.replaced_by: Identity | None = None
        self.arenas = Arenas(layout, [group.rule.name for group in groups.list], device)
        self.arenas.timeline = timeline
        self.stepper = Stepper(name)
        self.publisher = Publisher(self.arenas, self.stepper)

    def require_current(self, identity: Identity) -> None:
        """ModelLost, Superseded or ModelFailed unless `identity` is of this model on this timeline."""
        if identity.model_uid != self.uid:
            raise ModelLost(model=self.name)
        if identity.timeline != self.timeline:
            raise Superseded(model=self.name, timeline=self.timeline, got=identity.timeline)
        self.require_whole()

    def require_whole(self) -> None:
        """ModelLost once it is deleted; ModelFailed while a broken-off step has left it between two versions."""
        if self.deleted:
            raise ModelLost(model=self.name)
        if self.failed is not None:
            raise self.failed.with_traceback(None)  # or it grows with every request that it refuses

    def fail(self, problem: BaseException) -> None:
        """A step broke off half way: take nothing more until a restore replaces the arenas."""
        self.failed = ModelFailed(model=self.name, version=self.version, problem=type(problem).__name__)
        self.record("failed", "server", problem=str(problem))

    # Edits. Each returns the version from which it holds.

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

    def evict(self, worker: str, by: str) -> int:
        """Fence a worker."""
        self.sessions.evict(worker)
        return self._edited("worker_evicted", by, worker=worker)

    def _edited(self, kind: str, by: str, **facts: Any) -> int:
        self.edit += 1
        self.record(kind, by, **facts)
        return self.version + 1

    def record(self, kind: str, by: str, **facts: Any) -> None:
        """Note an event: who did what, after which version."""
        self._events_seen += 1
        self.events.append(
            {
                "id": self._events_seen,
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

    def restore(self, copy: ArenasCopy, saved: Mapping[str, Any] | None, timeline: int, by: str) -> None:
        """Become `copy` on a new, already durable timeline; `saved` is the snapshot's groups and hooks.

        All epochs close: a push of the old timeline, one that waits too, is told `superseded`.
        """
        self.timeline = timeline
        self.version = copy.version
        self.failed = None
        self.extras = copy.extras
        if saved is not None:
            revisions = [group.revision for group in self.groups.list]
            for hook in list(self.hooks.list):
                self.hooks.remove(hook.hook_id, self.groups, self.name)
            self.groups.list[:] = ParamGroups.parse(saved["groups"]).list
            for group, revision in zip(self.groups.list, revisions, strict=False):
                group.revision = revision + 1
            self.hooks.parse(saved["hooks"], self.groups, self.name)
            self.edit = int(saved["edit"])
        self.sessions.close_epochs()
        self.record("restored", by)
        arenas, publisher = self.arenas, self.publisher

        def load() -> None:
            arenas.load(copy, timeline)
            publisher.forget()

        self.stepper.submit(load)

    def add_groups(self, layout: Layout, added: list[Group]) -> None:
        """Take on further groups at the end; `layout` has them. Values are written by the caller's job."""
        self.layout = layout
        self.groups.list.extend(added)
        names = [group.rule.name for group in self.groups.list]
        self.stepper.submit(lambda: self.arenas.grow(layout, names))

    # What snapshots hold.

    def dump(self) -> dict[str, Any]:
        """Everything but the arenas, as JSON, at this moment's version."""
        return {
            "model": self.name,
            "uid": self.uid.hex(),
            "timeline": self.timeline,
            "version": self.version,
            "edit": self.edit,
            "policy": self.policy.dump(),
            "groups": self.groups.dump(),
            "hooks": self.hooks.dump(),
            "workers": self.sessions.dump(),
        }

    async def copy(self) -> tuple[dict[str, Any], ArenasCopy]:
        """Groups, hooks and workers with the arenas of exactly the same version."""
        self.require_whole()
        facts, extras = self.dump(), self.extras
        copy = await self.stepper.submit(self.arenas.copy)
        return facts, replace(copy, extras=extras)

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
        await self.stepper.close()
        self.hooks.close()


def refuse_consumed(error: PushstepError) -> PushstepError:
    """Mark an error as a verdict: its push took its sequence, and a retry gets the same error."""
    error.fields["consumed"] = "True"
    return error
