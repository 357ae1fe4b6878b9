"""Operators' edits of one model. Each returns the first version that it applies to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pushstep.proto.errors import InvalidHyperparameter

from ..coordinator.admission import GateSettings
from ..coordinator.groups import Group
from ..coordinator.hooks.hook import Hook
from ..coordinator.policies.policy import PolicySettings
from ..journal.durability import DurabilitySettings
from .model import Model


class Edits:
    """What operators may change in a model while it is trained."""

    def __init__(self, model: Model) -> None:
        self._model = model

    async def try_group(self, index: int, values: Mapping[str, Any]) -> None:
        """InvalidHyperparameter if a step with these values would make parameters NaN or infinite."""
        changed = self._model.groups.changed(index, values, self._model.name)
        if not await self._model.writer.submit(lambda: self._model.arenas.stays_finite(index, changed)):
            raise InvalidHyperparameter(
                problem=f"{dict(values)}: the next step would make NaN or infinity of parameters of group {index}"
            )

    def patch_group(self, index: int, values: Mapping[str, Any], hold: bool, by: str) -> tuple[Group, int]:
        """Change a group's hyperparameters from the next version on."""
        group = self._model.groups.patch(index, values, hold, self._model.name)
        return group, self._edited("param_group_changed", by, group=index, values=dict(values), hold=hold)

    def add_hook(
        self, name: str, point: str, settings: Mapping[str, Any], prepend: bool, by: str
    ) -> tuple[Hook, int]:
        """Install a hook from the next version on."""
        hook = self._model.hooks.add(name, point, settings, self._model.groups, self._model.name, prepend)
        return hook, self._edited("hook_added", by, hook=hook.hook_id, point=point)

    def remove_hook(self, hook_id: str, by: str) -> int:
        """Remove a hook from the next version on."""
        self._model.hooks.remove(hook_id, self._model.groups, self._model.name)
        return self._edited("hook_removed", by, hook=hook_id)

    def set_policy(self, settings: PolicySettings, by: str) -> int:
        """Use another policy or other settings from the next version on. OverCapacity as `begin_under`."""
        self._model.require_round_fits(settings, self._model.sessions.live_count())
        decisions = self._model.coordinator.switch(settings, self._model.clock())
        version = self._edited("policy_changed", by, **settings.model_dump(mode="json"))
        self._model.executor.apply(decisions)
        return version

    def set_gate(self, settings: GateSettings, by: str) -> int:
        """Change the settings of the gate."""
        self._model.coordinator.admission.settings = settings
        return self._edited("gate_changed", by, **settings.model_dump(mode="json"))

    def set_durability(self, settings: DurabilitySettings, by: str) -> int:
        """Keep the model on the disk in another way. Whoever calls this opens or closes the journal."""
        self._model.durability = settings
        return self._edited("durability_changed", by, **settings.model_dump(mode="json"))

    def evict(self, worker: str, by: str) -> int:
        """Fence a worker."""
        decisions = self._model.coordinator.evicted(worker, self._model.clock())
        version = self._edited("worker_evicted", by, worker=worker)
        self._model.executor.apply(decisions)
        return version

    def release(self, worker: str, by: str) -> int:
        """Let a worker out of quarantine."""
        decisions = self._model.coordinator.released(worker, self._model.clock())
        version = self._edited("worker_released", by, worker=worker)
        self._model.executor.apply(decisions)
        return version

    def _edited(self, kind: str, by: str, **facts: Any) -> int:
        self._model.edit += 1
        self._model.record(kind, by, **facts)
        self._model.executor.record_changes()
        return self._model.version + 1
