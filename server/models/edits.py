"""Operators' edits of one model. Each returns the first version that it applies to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from pushstep.proto.errors import InvalidHyperparameter

from ..coordinator.admission import GateSettings
from ..coordinator.commits import DURABILITY, GATE, GROUPS, HOOKS, POLICY, of_group, of_hook
from ..coordinator.groups import Group, OperatorEdit, ParamGroups
from ..coordinator.hooks.chain import HookChain
from ..coordinator.hooks.hook import Hook
from ..coordinator.policies.policy import PolicySettings
from ..journal.durability import DurabilitySettings
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
        return group, self._edited("param_group_changed", by, touched, **facts)

    def planned_hooks(
        self, name: str, point: str, settings: Mapping[str, Any], prepend: bool
    ) -> tuple[Hook, HookChain]:
        """A hook as it would be installed, and the chain with it. Raises what `add_hook` raises."""
        chain = HookChain()
        chain.become(self._model.hooks)
        # copies, for a scheduler claims its groups
        groups = ParamGroups(replace(group) for group in self._model.groups.list)
        return chain.add(name, point, settings, groups, self._model.name, prepend), chain

    def add_hook(
        self, name: str, point: str, settings: Mapping[str, Any], prepend: bool, by: str
    ) -> tuple[Hook, int]:
        """Install a hook from the next version on."""
        held = self._held_by()
        hook = self._model.hooks.add(name, point, settings, self._model.groups, self._model.name, prepend)
        touched = [HOOKS, of_hook(hook.hook_id), *self._claimed_since(held)]
        return hook, self._edited("hook_added", by, touched, hook=hook.hook_id, point=point)

    def remove_hook(self, hook_id: str, by: str) -> int:
        """Remove a hook from the next version on."""
        held = self._held_by()
        self._model.hooks.remove(hook_id, self._model.groups, self._model.name)
        self._model.revisions.forget(of_hook(hook_id))
        touched = [HOOKS, *self._claimed_since(held)]
        return self._edited("hook_removed", by, touched, hook=hook_id)

    def _held_by(self) -> list[str | None]:
        """The hook that holds the lr of each group."""
        return [group.scheduled_by for group in self._model.groups.list]

    def _claimed_since(self, held: Sequence[str | None]) -> list[str]:
        """The resources of the groups that another hook holds than `held` says."""
        pairs = enumerate(zip(held, self._held_by(), strict=True))
        found = [of_group(index) for index, (before, now) in pairs if before != now]
        return [GROUPS, *found] if found else []

    def set_policy(self, settings: PolicySettings, by: str) -> int:
        """Use another policy or other settings from the next version on. OverCapacity as `begin_under`."""
        self._model.require_round_fits(settings, self._model.sessions.live_count())
        decisions = self._model.coordinator.switch(settings, self._model.clock())
        version = self._edited("policy_changed", by, [POLICY], **settings.model_dump(mode="json"))
        self._model.executor.apply(decisions)
        return version

    def set_gate(self, settings: GateSettings, by: str) -> int:
        """Change the settings of the gate."""
        self._model.coordinator.admission.settings = settings
        return self._edited("gate_changed", by, [GATE], **settings.model_dump(mode="json"))

    def set_durability(self, settings: DurabilitySettings, by: str) -> int:
        """Keep the model on the disk in another way. Whoever calls this opens or closes the journal."""
        self._model.durability = settings
        return self._edited("durability_changed", by, [DURABILITY], **settings.model_dump(mode="json"))

    def evict(self, worker: str, by: str) -> int:
        """Fence a worker."""
        decisions = self._model.coordinator.evicted(worker, self._model.clock())
        version = self._edited("worker_evicted", by, (), worker=worker)
        self._model.executor.apply(decisions)
        return version

    def release(self, worker: str, by: str) -> int:
        """Let a worker out of quarantine."""
        decisions = self._model.coordinator.released(worker, self._model.clock())
        version = self._edited("worker_released", by, (), worker=worker)
        self._model.executor.apply(decisions)
        return version

    def quarantine(self, worker: str, by: str) -> int:
        """Read nothing more of a worker until it is released."""
        decisions = self._model.coordinator.quarantine(worker, self._model.clock())
        version = self._edited("worker_quarantined", by, (), worker=worker)
        self._model.executor.apply(decisions)
        return version

    def _edited(self, kind: str, by: str, touched: Sequence[str], **facts: Any) -> int:
        self._model.edit += 1
        self._model.revisions.note(self._model.edit, *touched)
        self._model.record(kind, by, **facts)
        self._model.executor.record_changes()
        return self._model.version + 1
