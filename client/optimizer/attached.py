"""The worker's half of an attached model: its groups, parameters and buffers, and the steps of attaching.

Attaching happens whole or not at all. `client/attachment/attachment.py` has refused what could not work. A failure after
that is undone, here and on the server. The same holds for an added group.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from pushstep.proto.errors import Superseded, UnsupportedModule
from pushstep.proto.wire.layout import Layout

from ..attachment.attachment import Attachment, added_group
from ..attachment.buffers import Extras
from ..attachment.hyperparameters import Group, Hyperparameters
from ..attachment.local_edits import same_bits
from ..attachment.originals import Takeover
from ..attachment.overwritten import Overwritten
from ..attachment.parameters import Parameters
from ..membership.policy import Policy
from ..transport.streams import Pulled
from ..warn import warn
from ..worker.worker import Worker
from .gradients_in_place import GradientsInPlace
from .overlap import Overlap

log: Final = logging.getLogger("pushstep.client")


class Attached:
    """Owns the parameters, groups, buffers and hooks that the optimizer and its checkpoints use."""

    def __init__(
        self,
        worker: Worker,
        attachment: Attachment,
        param_groups: Callable[[], list[dict[str, Any]]],
        module: nn.Module | None,
        *,
        watch_whole: bool,
        overlap: bool,
        prefetch: bool,
    ) -> None:
        self.worker = worker
        self.membership = worker.membership
        self.optimizers = attachment.optimizers
        self.rules = list(attachment.rules)
        self.optimizer_of = list(attachment.optimizer_of)
        # whose values training began with: "worker" if attach created the model, "server" if the model existed
        self.values_from: Literal["worker", "server"] = "worker"
        # True if the server's state replaced a state of this worker's optimizers, and no step was taken since
        self.state_discarded = False
        self.parameters = Parameters(worker.model, watch_whole=watch_whole)
        self.parameters.add(attachment.lists, attachment.names)
        self.hyperparameters = Hyperparameters()
        self.extras = Extras(worker.membership, module)
        self.overwritten = Overwritten()
        self.in_place = GradientsInPlace(worker.memory, self.parameters)
        self.overlap = Overlap(worker, self.parameters) if overlap else None
        self._groups: list[Group] = []
        self._attachment = attachment
        self._param_groups = param_groups
        self._module = module
        self._prefetch = prefetch

    @property
    def groups(self) -> list[Group]:
        """The current param groups. A user may put other dicts into the optimizer's list."""
        current, known = self._param_groups(), self._groups
        if len(current) != len(known) or not all(map(is_, current, [group.settings for group in known])):
            self._groups = [Group(*each) for each in zip(current, self.rules, self.optimizer_of, strict=True)]
        return self._groups

    # Attaching.

    def begin(self, taker: torch.optim.Optimizer, policy: Policy | None, undo: contextlib.ExitStack) -> None:
        """Attach: join or create the model, take its values, take over the optimizers. `undo` gets what reverses it."""
        attachment, membership = self._attachment, self.membership
        extras = self.extras.begin(attachment.stepped)
        self._check_overlap()
        undo.callback(self._unwatch)
        self._watch()
        undo.callback(membership.undo_join)
        created = membership.join_or_create(
            attachment.manifest, attachment.values, attachment.steps, policy, extras
        )
        undo.callback(self.hyperparameters.put_back, self.groups, self.hyperparameters.copies(self.groups))
        undo.callback(self.overwritten.put_back, self.parameters.by_name)
        undo.callback(self.extras.undo)
        self._take_first(created=created)
        self.worker.memory.open(membership.member())
        takeover = Takeover(attachment.optimizers, taker)
        undo.callback(takeover.undo)
        takeover.do()

    def _take_first(self, *, created: bool) -> None:
        """Take the model's values and hyperparameters, or note that this worker's became the model's."""
        member = self.membership.member()
        self.hyperparameters.leads = member.lead
        mine = [group.values() for group in self.groups]
        if created:
            self.parameters.note(member.timeline, member.version)
            self.extras.created(member.extras_version)
        else:
            self.values_from = "server"
            self.extras.join(member.extras_version)
            # after the extras: a buffer may share a parameter's memory, and the parameter's values must win
            pulled = self._newest()
            self._keep(pulled)
            self.parameters.take(pulled)
            self.state_discarded = self._brings_another_state()
        self.hyperparameters.write(self.groups, member.groups)
        self._say_whose(mine, [group.values() for group in self.groups])

    def _brings_another_state(self) -> bool:
        """True if the optimizers were stepped and their state differs from the server's."""
        steps, states = self._attachment.steps, self._attachment.states
        if not steps:
            return False
        held = self.worker.pull_state()
        same = {
            slot.name
            for slot, state, values in held.dense()
            if state and slot.name in states and same_bits(states[slot.name][state].to(values.dtype), values)
        }
        return list(held.header.steps) != steps or any(
            name not in same and self.parameters[name].numel() for name in states
        )

    def _keep(self, pulled: Pulled) -> None:
        for slot, _, values in pulled.dense():
            if slot.name in self.parameters:
                self.overwritten.keep(slot.name, self.parameters[slot.name], values)

    def _say_whose(
        self, mine: Sequence[Mapping[str, float | bool]], theirs: Sequence[Mapping[str, float | bool]]
    ) -> None:
        model, worker = self.membership.model, self.membership.worker
        version = self.membership.member().version
        if self.values_from == "worker":
            log.info("model %s begins with the values of worker %s", model, worker)
        else:
            log.info("model %s is at version %d: worker %s takes its values", model, version, worker)
        if mine != theirs:
            differing = sorted({k for a, b in zip(mine, theirs, strict=True) for k in a if a[k] != b.get(k)})
            warn(
                f"model {model!r} has other values of {', '.join(differing)} than this worker's optimizer; the "
                f"server's hold, and `pushstep groups {model} INDEX --set NAME=VALUE` changes them for all"
            )
        if self.state_discarded:
            warn(
                f"model {model!r} is at version {version}: its values and optimizer state hold, and not this worker's, which "
                f"has taken {max(self._attachment.steps)} steps. load_state_dict() goes back to a checkpoint"
            )

    # Hooks and shared memory.

    def _check_overlap(self) -> None:
        if self.overlap is not None and len(self.parameters.single()) < len(self.parameters.by_name):
            raise UnsupportedModule(
                problem="overlap sends each gradient by itself, and here several parameters are one memory: attach without it"
            )

    def _watch(self) -> None:
        parameters = self.parameters.single()
        if self._prefetch:
            self.worker.memory.decline()
        self.worker.memory.follow(parameters)
        self.in_place.watch(parameters)
        if self.overlap is not None:
            self.overlap.watch(parameters)

    def _unwatch(self) -> None:
        self.worker.memory.reset()
        self.in_place.remove()
        if self.overlap is not None:
            self.overlap.stop()

    # Local changes.

    def follow(self) -> None:
        """Take up the tensors that the groups hold now, since one may have been replaced."""
        lists = [settings["params"] for settings in self._param_groups()]
        if self.parameters.follow(lists, self._layout) or (self.in_place.frozen and self.in_place.waits):
            self._watch()
        self.overwritten.drop(
            self.parameters.fresh
        )  # the values of a tensor that was put in place are wanted

    def _layout(self) -> Layout:
        return self.membership.member().layout

    def _newest(self) -> Pulled:
        return self.worker.pull_message(None)

    def edited(self) -> list[str]:
        """Return the names of parameters that differ from the server's version."""
        names = self.parameters.edited(self._newest, self._layout)
        if self.parameters.written:
            self.overwritten.drop(self.parameters.written)
        return names

    def send_edits(self, names: Sequence[str]) -> None:
        """Send local parameters as a version of their own; replaced tensors begin with fresh state."""
        at, values = self.parameters.at, self.parameters.values(self.membership.member().layout, names)
        try:
            version = self.membership.upload_values(values, list(self.parameters.fresh))
        except Superseded:
            if at is None:
                raise
            self.membership.leave_untold(at[0])  # the next push reports the restore
            return
        self.parameters.fresh.clear()
        timeline = self.membership.member().timeline
        if at == (timeline, version - 1):
            self.parameters.note(timeline, version)
        else:  # other versions came between: the next answer brings them
            self.parameters.settle()

    def upload(self) -> int:
        """Send all local parameters as a version of their own; return the version."""
        values = self.parameters.values(self.membership.member().layout)
        version = self.membership.upload_values(values, list(self.parameters.fresh))
        self.parameters.fresh.clear()
        self.stepped()
        self.parameters.note(self.membership.member().timeline, version)
        return version

    def stepped(self) -> None:
        """Forget what attach found: the model has changed since."""
        if self.overwritten.values:
            self.overwritten.forget()
        self.state_discarded = False

    def start_over(self, since: Sequence[Mapping[str, float | bool]] = ()) -> None:
        """Take the hyperparameters of a new membership; after a restore, also the restored buffers.

        `since`: see Hyperparameters.write. The caller pulls the parameters next. If that fails, `parameters.at` still names
        the timeline that the local parameters belong to.
        """
        member = self.membership.member()
        self.hyperparameters.leads = member.lead
        self.hyperparameters.write(self.groups, member.groups, since)
        if self.parameters.at is not None and self.parameters.at[0] != member.timeline:
            self.extras.rejoin(member.extras_version)

    # Adding a group.

    def add_group(self, rule: str, optimizer: int, undo: contextlib.ExitStack) -> None:
        """Add the last param group, which is new, to the model. `undo` gets what reverses it here."""
        self._groups = []
        self.rules.append(rule)
        undo.callback(self.rules.pop)
        self.optimizer_of.append(optimizer)
        undo.callback(self.optimizer_of.pop)
        group = self.groups[-1]
        tensors: list[Tensor] = group.settings["params"]
        known = list(self.parameters.by_name.items())
        manifest, names = added_group(group, len(self.rules) - 1, self._module, known)
        before = self.hyperparameters.copies([group])
        member = self.membership.add_group(
            manifest, dict(zip(reversed(names), reversed(tensors), strict=True))
        )
        undo.callback(self._watch)
        undo.callback(self.parameters.keep, len(self.rules) - 1)
        undo.callback(self.hyperparameters.put_back, [group], before)
        self.parameters.add([tensors], [names])
        self._check_overlap()
        self.extras.exclude(manifest)
        self._watch()
        self.worker.memory.open(member)
        self.hyperparameters.write(self.groups, member.groups)
        self.parameters.take(self._newest())
