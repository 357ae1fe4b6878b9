"""The worker's half of a model that optimizers were attached to: groups, parameters, buffers, and how it all begins.

Attaching is done whole or not at all: what could not work was refused before (attachment.py), and whatever fails on the way
is undone, here and on the server. The same holds for a group that is added.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import Tensor, nn

from pushstep.proto.errors import Superseded, UnsupportedModule
from pushstep.proto.layout import Layout

from . import caller
from .attachment import Attachment, added_group
from .extras import Extras
from .hyperparameters import Group, Hyperparameters
from .lent_gradients import LentGradients
from .local_edits import same_bits
from .originals import Takeover
from .overlap import Overlap
from .overwritten import Overwritten
from .parameters import Parameters
from .policy import Policy
from .transport import Pulled

if TYPE_CHECKING:
    from .session import Session

log: Final = logging.getLogger("pushstep.client")


class Attached:
    """Owns what the optimizer and its checkpoints work on."""

    def __init__(
        self,
        session: Session,
        attachment: Attachment,
        param_groups: Callable[[], list[dict[str, Any]]],
        module: nn.Module | None,
        *,
        watch_whole: bool,
        overlap: bool,
        prefetch: bool,
    ) -> None:
        self.session = session
        self.optimizers = attachment.optimizers
        self.rules = list(attachment.rules)
        self.optimizer_of = list(attachment.optimizer_of)
        # whose values this began with: "worker" if attach created the model from them, "server" if they were there
        self.values_from: Literal["worker", "server"] = "worker"
        # this worker's optimizers came with a state that the server's has taken the place of, and no step was taken since
        self.state_discarded = False
        self.parameters = Parameters(session.model, watch_whole=watch_whole)
        self.parameters.add(attachment.lists, attachment.names)
        self.hyperparameters = Hyperparameters()
        self.extras = Extras(session, module)
        self.overwritten = Overwritten()
        self.lent = LentGradients(session.memory, self.parameters)
        self.overlap = Overlap(session, self.parameters) if overlap else None
        self._attachment = attachment
        self._param_groups = param_groups
        self._module = module
        self._prefetch = prefetch

    @property
    def groups(self) -> list[Group]:
        """The param groups as they stand."""
        return [
            Group(*each) for each in zip(self._param_groups(), self.rules, self.optimizer_of, strict=True)
        ]

    # Becoming the model's, or the model becoming ours.

    def begin(self, taker: torch.optim.Optimizer, policy: Policy | None, undo: contextlib.ExitStack) -> None:
        """Do all that attaching is; what `undo` calls has it not have been."""
        attachment, session = self._attachment, self.session
        extras = self.extras.begin(attachment.stepped)
        self._check_overlap()
        undo.callback(self._unwatch)
        self._watch()
        undo.callback(session.undo_join)
        created = session.join_or_create(
            attachment.manifest, attachment.values, attachment.steps, policy, extras
        )
        undo.callback(self.hyperparameters.put_back, self.groups, self.hyperparameters.copies(self.groups))
        undo.callback(self.overwritten.put_back, self.parameters.by_name)
        undo.callback(self.extras.undo)
        self._take_first(created=created)
        session.memory.open(session.member())
        takeover = Takeover(attachment.optimizers, taker)
        undo.callback(takeover.undo)
        takeover.do()

    def _take_first(self, *, created: bool) -> None:
        """Have the model's values here, whosever they are."""
        member = self.session.member()
        self.hyperparameters.leads = member.lead
        mine = [group.values() for group in self.groups]
        if created:
            self.parameters.note(member.timeline, member.version)
            self.extras.created(member.extras_version)
        else:
            self.values_from = "server"
            self.extras.join(member.extras_version)
            # behind the extras: a buffer may lie over a parameter
            pulled = self._newest()
            self._keep(pulled)
            self.parameters.take(pulled)
            self.state_discarded = self._brings_another_state()
        self.hyperparameters.write(self.groups, member.groups)
        self._say_whose(mine, [group.values() for group in self.groups])

    def _brings_another_state(self) -> bool:
        """Whether the optimizers have been stepped, to another state than the server's."""
        steps, states = self._attachment.steps, self._attachment.states
        if not steps:
            return False
        held = self.session.pull_state()
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
        model, worker = self.session.model, self.session.worker
        version = self.session.member().version
        if self.values_from == "worker":
            log.info("model %s begins with the values of worker %s", model, worker)
        else:
            log.info("model %s is at version %d: worker %s takes its values", model, version, worker)
        if mine != theirs:
            differing = sorted({k for a, b in zip(mine, theirs, strict=True) for k in a if a[k] != b.get(k)})
            caller.warn(
                f"model {model!r} has other values of {', '.join(differing)} than this worker's optimizer; the server's hold"
            )
        if self.state_discarded:
            caller.warn(
                f"model {model!r} is at version {version}: its values and optimizer state hold, and not this worker's, which "
                f"has taken {max(self._attachment.steps)} steps. load_state_dict() goes back to a checkpoint"
            )

    # Hooks, and memory that is shared.

    def _check_overlap(self) -> None:
        if self.overlap is not None and len(self.parameters.single()) < len(self.parameters.by_name):
            raise UnsupportedModule(
                problem="overlap sends each gradient by itself, and here several parameters are one memory: attach without it"
            )

    def _watch(self) -> None:
        parameters = self.parameters.single()
        if self._prefetch:
            self.session.memory.decline()
        self.session.memory.follow(parameters)
        self.lent.watch(parameters)
        if self.overlap is not None:
            self.overlap.watch(parameters)

    def _unwatch(self) -> None:
        self.session.memory.reset()
        self.lent.remove()
        if self.overlap is not None:
            self.overlap.stop()

    # What was changed here.

    def follow(self) -> None:
        """Have the tensors that the groups hold now: one may have been replaced."""
        lists = [settings["params"] for settings in self._param_groups()]
        if self.parameters.follow(lists, self._layout) or self.lent.waits:
            self._watch()

    def _layout(self) -> Layout:
        return self.session.member().layout

    def _newest(self) -> Pulled:
        return self.session.pull_message(None)

    def edited(self) -> list[str]:
        """The names of parameters that are not as the server's version left them."""
        names = self.parameters.edited(self._newest, self._layout)
        self.overwritten.drop(self.parameters.written)
        return names

    def send_edits(self, names: Sequence[str]) -> None:
        """Send parameters as they are here, as a version; those that were replaced begin with fresh state."""
        at, values = self.parameters.at, self.parameters.values(self.session.member().layout, names)
        try:
            version = self.session.upload_values(values, list(self.parameters.fresh))
        except Superseded:
            if at is None:
                raise
            self.session.leave_untold(at[0])  # the push will tell of the restore, as pushes do
            return
        self.parameters.fresh.clear()
        timeline = self.session.member().timeline
        if at == (timeline, version - 1):
            self.parameters.note(timeline, version)
        else:  # others came between: what they made comes with the next answer
            self.parameters.settle()

    def upload(self) -> int:
        """Send all parameters as they are here, as a version of their own; the version."""
        values = self.parameters.values(self.session.member().layout)
        version = self.session.upload_values(values, list(self.parameters.fresh))
        self.parameters.fresh.clear()
        self.stepped()
        self.parameters.note(self.session.member().timeline, version)
        return version

    def stepped(self) -> None:
        """The model has moved on from how attach found it."""
        self.overwritten.forget()
        self.state_discarded = False

    def start_over(self, since: Sequence[Mapping[str, float | bool]] = ()) -> None:
        """Take the hyperparameters of the membership that was joined anew; after a restore, what it restored, too.

        The parameters are pulled next. Should that fail, they are still known to be of the timeline that they are of.
        """
        member = self.session.member()
        self.hyperparameters.leads = member.lead
        self.hyperparameters.write(self.groups, member.groups, since)
        if self.parameters.at is not None and self.parameters.at[0] != member.timeline:
            self.extras.rejoin(member.extras_version)

    # A group more.

    def add_group(self, rule: str, optimizer: int, undo: contextlib.ExitStack) -> None:
        """The last param group is new: have it in the model."""
        self.rules.append(rule)
        undo.callback(self.rules.pop)
        self.optimizer_of.append(optimizer)
        undo.callback(self.optimizer_of.pop)
        group = self.groups[-1]
        tensors: list[Tensor] = group.settings["params"]
        known = list(self.parameters.by_name.items())
        manifest, names = added_group(group, len(self.rules) - 1, self._module, known)
        before = self.hyperparameters.copies([group])
        member = self.session.add_group(manifest, dict(zip(reversed(names), reversed(tensors), strict=True)))
        undo.callback(self._watch)
        undo.callback(self.parameters.keep, len(self.rules) - 1)
        undo.callback(self.hyperparameters.put_back, [group], before)
        self.parameters.add([tensors], [names])
        self._check_overlap()
        self.extras.exclude(manifest)
        self._watch()
        self.session.memory.open(member)
        self.hyperparameters.write(self.groups, member.groups)
        self.parameters.take(self._newest())
