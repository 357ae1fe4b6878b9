"""Operators' edits of one model. Each returns the first version that it applies to."""

from __future__ import annotations

from asyncio import Future
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from pushstep.proto.errors import InvalidHyperparameter

from ..arenas.arenas_copy import ArenasCopy
from ..arenas.averages import Averages
from ..coordinator.commits import DURABILITY, GATE, GROUPS, HOOKS, POLICY, of_group, of_hook
from ..coordinator.gate import GateSettings
from ..coordinator.groups import Group, OperatorEdit, ParamGroups
from ..coordinator.hooks.chain import HookChain
from ..coordinator.hooks.hook import Hook
from ..coordinator.policies.policy import PolicySettings
from ..journal.durability import DurabilitySettings
from ..parts.refusals import refuse_hooks
from .model import Model

# How often an edit is tried anew because the group has changed in between.
MOST_TRIALS: Final = 4


class Edits:
    """What operators may change in a model while it is trained."""

    def __init__(self, model: Model) -> None:
        self._model = model

    async def try_group(self, index: int, edit: OperatorEdit) -> Group:
        """The group as the edit would make it, on the values that it has when this returns.

        InvalidHyperparameter if a step with them would make parameters NaN or infinite. Raises what `patched` raises.
        """
        groups, name = self._model.groups, self._model.name
        for _ in range(MOST_TRIALS):
            basis = groups.at(index, name).basis()
            patched = groups.patched(index, edit, name)
            arenas, values = self._model.arenas, patched.values
            if not await self._model.writer.submit(partial(arenas.stays_finite, index, values)):
                raise InvalidHyperparameter(
                    problem=f"{dict(edit.values)}: the next step would make NaN or infinity of parameters of group {index}"
                )
            if groups.at(index, name).is_at(basis):
                return patched
        # a scheduler changes the group at every step: its edits are not tried either
        return groups.patched(index, edit, name)

    def patch_group(self, index: int, edit: OperatorEdit, by: str) -> tuple[Group, int]:
        """Change a group from the next version on."""
        group = self._model.groups.patch(index, edit, self._model.name)
        facts: dict[str, Any] = {"group": index, "values": dict(edit.values), "hold": edit.hold}
        if edit.frozen is not None:
            facts["frozen"] = edit.frozen
        touched = [GROUPS, of_group(index)]
        return group, self.edited("param_group_changed", by, touched, **facts)

    def add_groups(self, extension: ArenasCopy, added: Sequence[Group], by: str) -> tuple[int, Future[None]]:
        """Add groups at the end, from the next version on. `extension` has their arenas, with values.

        The future is done when the arenas have them.
        """
        first = len(self._model.groups.list)
        adopting = self._model.add_groups(extension, list(added))
        touched = [GROUPS, *(of_group(first + index) for index in range(len(added)))]
        return self.edited("param_group_added", by, touched, group=first), adopting

    def set_policy(self, settings: PolicySettings, by: str) -> int:
        """Use another policy or other settings from the next version on. OverCapacity as `begin_under`."""
        self._model.require_gradients_fit(settings, self._model.sessions.live_count())
        decisions = self._model.coordinator.switch(settings, self._model.clock())
        version = self.edited("policy_changed", by, [POLICY], **settings.model_dump(mode="json"))
        self._model.executor.apply(decisions)
        return version

    def set_gate(self, settings: GateSettings, by: str) -> int:
        """Change the settings of the gate."""
        self._model.coordinator.gate.settings = settings
        return self.edited("gate_changed", by, [GATE], **settings.model_dump(mode="json"))

    def set_durability(self, settings: DurabilitySettings, by: str) -> int:
        """Keep the model on the disk in another way. Whoever calls this opens or closes the journal."""
        self._model.durability = settings
        return self.edited("durability_changed", by, [DURABILITY], **settings.model_dump(mode="json"))

    def evict(self, worker: str, by: str) -> int:
        """Fence a worker."""
        decisions = self._model.coordinator.evicted(worker, self._model.clock())
        version = self.edited("worker_evicted", by, (), worker=worker)
        self._model.executor.apply(decisions)
        return version

    def release(self, worker: str, by: str) -> int:
        """Let a worker out of quarantine."""
        decisions = self._model.coordinator.released(worker, self._model.clock())
        version = self.edited("worker_released", by, (), worker=worker)
        self._model.executor.apply(decisions)
        return version

    def quarantine(self, worker: str, by: str) -> int:
        """Read nothing more of a worker until it is released."""
        decisions = self._model.coordinator.quarantine(worker, self._model.clock())
        version = self.edited("worker_quarantined", by, (), worker=worker)
        self._model.executor.apply(decisions)
        return version

    def edited(self, kind: str, by: str, touched: Sequence[str], **facts: Any) -> int:
        """Note an edit, and what it has touched. Returns the first version that it applies to."""
        self._model.edit += 1
        self._model.revisions.note(self._model.edit, *touched)
        self._model.record(kind, by, **facts)
        self._model.executor.record_changes()
        return self._model.version + 1


@dataclass(frozen=True, slots=True)
class Edited:
    """What an edit of a hook has led to, or would."""

    hook: Hook
    chain: HookChain
    effective_version: int


class HookEdits:
    """Operators' edits of one model's hooks. Each is planned first, which raises whatever it would raise."""

    def __init__(self, model: Model, promised: Callable[[int], AbstractContextManager[None]]) -> None:
        """`promised` reserves bytes of --max-bytes for a block. OverCapacity."""
        self._model = model
        self._promised = promised

    def planned_add(self, name: str, point: str, settings: Mapping[str, Any], prepend: bool) -> Edited:
        """A hook as it would be installed. InvalidHook, OverCapacity for averages, and what its `install` raises."""
        chain, groups = self._trial()
        hook = chain.add(name, point, settings, groups, self._model.name, prepend)
        refuse_hooks(self._model.shard, self._model.name, chain.list)
        self._prepare(hook)
        with self._promised(self._bytes_of(hook)):
            return Edited(hook, chain, self._model.version + 1)

    async def add(
        self,
        name: str,
        point: str,
        settings: Mapping[str, Any],
        prepend: bool,
        by: str,
        check: Callable[[], None] = lambda: None,
    ) -> Edited:
        """Install a hook. Raises what `planned_add` raises, and OutOfMemory. check: called right before the edit."""
        model = self._model
        planned = self.planned_add(name, point, settings, prepend).hook
        averaged, hook_id = list(planned.averages()), model.hooks.reserve(name)
        with self._promised(self._bytes_of(planned)):
            if averaged:
                await self._begin(hook_id, averaged)
            check()
            held = self._held_by()
            # another edit may have come while memory was taken: what holds is what is said now
            hook = model.hooks.add(name, point, settings, model.groups, model.name, prepend, hook_id)
        if averaged:
            # behind the steps that were queued meanwhile, as a replay has it
            self._begin(hook_id, averaged)
        return self._edited(hook, "hook_added", by, self._claimed_since(held), point=point)

    def planned_change(self, hook_id: str, changes: Mapping[str, Any], position: int | None) -> Edited:
        """A hook as it would be after a change of some settings, or of its place in the order."""
        chain, groups = self._trial()
        hook = chain.change(hook_id, changes, position, groups, self._model.name)
        refuse_hooks(self._model.shard, self._model.name, chain.list)
        self._prepare(hook)
        return Edited(hook, chain, self._model.version + 1)

    def change(self, hook_id: str, changes: Mapping[str, Any], position: int | None, by: str) -> Edited:
        """Change some settings of a hook, or its place in the order. Raises what `planned_change` raises."""
        model = self._model
        self.planned_change(hook_id, changes, position)
        held = self._held_by()
        hook = model.hooks.change(hook_id, changes, position, model.groups, model.name)
        model.observers.keep(model.hooks.list)
        facts: dict[str, Any] = {"settings": dict(changes)} if changes else {}
        facts |= {} if position is None else {"position": position}
        # another scheduler sets the lr of its groups at once
        touched = [of_group(index) for index, by_hook in enumerate(self._held_by()) if by_hook == hook_id]
        touched = [GROUPS, *touched] if touched and changes else []
        return self._edited(hook, "hook_changed", by, [*touched, *self._claimed_since(held)], **facts)

    def remove(self, hook_id: str, by: str) -> Edited:
        """Remove a hook. UnknownHook."""
        model, held = self._model, self._held_by()
        hook = model.hooks.remove(hook_id, model.groups, model.name)
        model.observers.keep(model.hooks.list)
        model.revisions.forget(of_hook(hook_id))
        arenas, wanted = model.arenas, model.hooks.averages()
        if hook.averages():
            model.writer.write(lambda: arenas.averages.keep(wanted, arenas.layout, arenas.parameters))
        touched = [HOOKS, *self._claimed_since(held)]
        version = Edits(model).edited("hook_removed", by, touched, hook=hook_id)
        return Edited(hook, model.hooks, version)

    def _trial(self) -> tuple[HookChain, ParamGroups]:
        """The hooks in a chain of its own, and copies of the groups, for a scheduler claims its groups."""
        chain = HookChain()
        chain.become(self._model.hooks)
        return chain, ParamGroups(replace(group) for group in self._model.groups.list)

    def _prepare(self, hook: Hook) -> None:
        if self._model.observers.place is not None:
            hook.prepare(self._model.observers.place)

    def _bytes_of(self, hook: Hook) -> int:
        return Averages.bytes_needed(self._model.layout, {hook.hook_id: hook.averages()})

    def _begin(self, hook_id: str, groups: Sequence[int]) -> Future[None]:
        """Have averages that equal the parameters. OutOfMemory, the first time."""
        return self._model.writer.write(partial(self._model.arenas.begin_averages, hook_id, groups))

    def _held_by(self) -> list[str | None]:
        """The hook that holds the lr of each group."""
        return [group.scheduled_by for group in self._model.groups.list]

    def _claimed_since(self, held: Sequence[str | None]) -> list[str]:
        """The resources of the groups that another hook holds than `held` says."""
        pairs = enumerate(zip(held, self._held_by(), strict=True))
        found = [of_group(index) for index, (before, now) in pairs if before != now]
        return [GROUPS, *found] if found else []

    def _edited(self, hook: Hook, kind: str, by: str, touched: Sequence[str], **facts: Any) -> Edited:
        touched = [HOOKS, of_hook(hook.hook_id), *touched]
        version = Edits(self._model).edited(kind, by, touched, hook=hook.hook_id, **facts)
        return Edited(hook, self._model.hooks, version)
