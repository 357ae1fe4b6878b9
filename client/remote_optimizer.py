"""An ordinary torch optimizer to everything that holds it, whose step the server takes.

`step()` sends the gradients and the hyperparameters that were changed here since the last receipt, and writes what
comes back into the parameters. The groups are the original optimizers' own dict objects, so schedulers made before
attach go on steering them.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from pushstep.proto.errors import (
    Fenced,
    LocalParameterEdit,
    PushstepError,
    Superseded,
    UnsupportedModule,
)
from pushstep.proto.types_pb2 import Manifest

from . import caller, remote_state
from .extras import Extras
from .hyperparameters import Group, Hyperparameters
from .lent_gradients import LentGradients
from .manifest import of_added_group, of_groups
from .metrics import Metrics
from .names import added_names, parameter_names
from .originals import brought_along, check_distinct, rule_of, take_over
from .overlap import Overlap
from .parameters import Parameters
from .participant import Step
from .policy import Policy
from .prefetch import Copies, Flight
from .receipt import Outcome, Receipt
from .scaling import Scaling
from .server_state import ServerState
from .shield import shield

if TYPE_CHECKING:
    from .session import Session


class RemoteOptimizer(torch.optim.Optimizer):
    """Made by `Session.attach`. `last_receipt` says what became of the last step."""

    _step_supports_amp_scaling = True

    def __init__(
        self,
        session: Session,
        optimizers: Sequence[torch.optim.Optimizer],
        module: nn.Module | None,
        names: Sequence[str] | Mapping[Tensor, str] | None,
        policy: Policy | None,
        *,
        single: bool,
        overlap: bool,
        prefetch: bool,
    ) -> None:
        if overlap and prefetch:
            raise UnsupportedModule(
                problem="with prefetch the whole exchange overlaps the next step's compute: attach without overlap"
            )
        if not optimizers:
            raise UnsupportedModule(problem="attach needs at least one optimizer")
        self._rules = [rule_of(optimizer) for optimizer in optimizers for _ in optimizer.param_groups]
        self._optimizer_of = [i for i, optimizer in enumerate(optimizers) for _ in optimizer.param_groups]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        check_distinct(p for group in groups for p in group["params"])
        # no defaults: they would add one rule's keys to another rule's groups
        super().__init__(groups, {})
        self.state = ServerState()
        self.defaults = dict(optimizers[0].defaults)
        self._session = session
        self._single = single
        self._originals = list(optimizers)
        self._module = module
        found, aliases = parameter_names(optimizers, module, names)
        parameters = (p for group in groups for p in group["params"])
        self._parameters = Parameters(session.model, dict(zip(found, parameters, strict=True)))
        self._hyperparameters = Hyperparameters()
        self._scaling = Scaling(self)
        self._last_state_dict: Any = None
        self.last_receipt: Receipt | None = None
        # how many samples the next step's gradients are over: their weight in a round; 0 counts as 1
        self.samples: float = 0
        self._metrics = Metrics()
        self._join(of_groups(self._groups(), found, aliases), policy)
        take_over(optimizers, self)
        if prefetch:
            session.memory.decline()
        session.memory.follow(p for group in groups for p in group["params"])
        self._lent = LentGradients(session.memory, self._parameters.name_of)
        self._lent.add(p for group in groups for p in group["params"])
        session.memory.open(session.member())
        self._copies = Copies() if prefetch else None
        self._flight: tuple[Flight[Step], list[dict[str, float | bool]]] | None = None
        self._overlap = Overlap(session, self._parameters) if overlap else None
        if self._overlap is not None:
            self._overlap.watch(parameter for group in groups for parameter in group["params"])
        session.before_close(self._lent.remove)
        weakref.finalize(self, self._lent.remove).atexit = False
        self._extras = Extras(session, module)
        self._extras.send()
        session.before_close(self._finish)

    # Becoming the model's, or the model becoming ours.

    def _groups(self) -> list[Group]:
        return [
            Group(*group) for group in zip(self.param_groups, self._rules, self._optimizer_of, strict=True)
        ]

    def _join(self, manifest: Manifest, policy: Policy | None) -> None:
        steps, values = brought_along(self._originals, self._parameters, self._rules, manifest)
        mine = [group.values() for group in self._groups()]
        created = self._session.join_or_create(manifest, values, steps, policy)
        member = self._session.member()
        if created:
            self._parameters.note(member.timeline, member.version)
        else:
            self._parameters.take(self._session.pull_message(None))
        self._hyperparameters.leads = member.lead
        self._hyperparameters.write(self._groups(), member.groups)
        theirs = [group.values() for group in self._groups()]
        if mine != theirs:
            differing = sorted({k for a, b in zip(mine, theirs, strict=True) for k in a if a[k] != b.get(k)})
            caller.warn(
                f"model {self._session.model!r} has other values of {', '.join(differing)} than this worker's optimizer; "
                "the server's hold"
            )

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Send the gradients; the server steps; the parameters come back. The closure's loss, if there is one.

        A parameter whose grad is None is not in the push; with no gradient at all nothing is sent. With `prefetch`
        the parameters that come back are those of the step before, and so are the errors that are raised.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self._originals:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # for schedulers made before attach
        with shield, self._scaling:
            self._exchange(loss)
        return loss

    def _exchange(self, loss: Any) -> None:
        if not self._session.ranks.looked:
            self._session.ranks.look(self._session.member().policy)
        edited = self._edited()
        if edited is not None:
            self._session.ranks.refuse_wrapper()  # whose broadcast it then was
            raise LocalParameterEdit(parameter=edited)
        computed_on = self._parameters.at
        self.synchronize()
        layout = self._session.member().layout
        gradients = self._parameters.gradients(layout)
        skip = self._scaling.found_inf()
        if skip:
            gradients = {}
        # before anything is said of what left early: those were not unscaled
        self._scaling.unscale(gradients.values())
        early = self._overlap.take(gradients, layout) if self._overlap is not None else None
        if not gradients and not skip:
            return
        send = partial(
            self._session.step,
            held=computed_on,
            onto=self._parameters.at,
            commit=self._session.commit(
                self._metrics.take(loss), self._hyperparameters.edits(self._groups()), self.samples
            ),
            skip=skip,
            pull=True,
        )
        if self._copies is None:
            try:
                self._take(partial(send, gradients, early=early))
            finally:
                if early is not None:
                    early.withdraw()
        else:
            copies = self._copies.of(gradients, self._session.compression.rounds_to)
            since = [group.values() for group in self._groups()]
            self._flight = self._session.fly(partial(send, copies)), since

    def report(self, **metrics: Any) -> None:
        """Have the next step tell the server these numbers, such as loss=..., for hooks (ReduceLROnPlateau) and operators.

        A closure's loss is told by itself.
        """
        self._metrics.report(metrics)

    @shield
    def synchronize(self) -> None:
        """With `prefetch`: wait for the push in flight, and take what came of it, as the next `step()` would.

        Raises what that push was refused with. Call it after the last step, and before parameters are looked at.
        """
        if self._flight is not None:
            self._session.wait_for_flight()  # which the user may interrupt, and come again
            (flight, since), self._flight = self._flight, None
            # what was written to parameters meanwhile is for the next step to refuse, or on its way up
            self._take(flight.land, since, into_parameters=self._parameters.written() is None)

    def _take(
        self,
        answer: Callable[[], Step],
        since: Sequence[Mapping[str, float | bool]] = (),
        *,
        into_parameters: bool = True,
    ) -> None:
        """Become what a step's answer says; `since`: the groups' values at that step, if it was an earlier one."""
        try:
            receipt, pulled = answer()
        except Superseded:
            self._start_over()
            self._parameters.take(self._session.pull_message(self._parameters.at))
            raise
        self.last_receipt = receipt
        self._last_state_dict = None
        if pulled is None and receipt.timeline != self._session.member().timeline:
            self._start_over()
        elif pulled is None and receipt.outcome is Outcome.APPLIED:
            self._start_over(since)  # joining again has settled it, and brought the groups
        if into_parameters and pulled is not None:
            self._parameters.take(pulled)
        elif into_parameters and receipt.reason != Fenced.code:  # who is fenced is told nothing more
            self._parameters.take(self._session.pull_message(self._parameters.at))
        if pulled is not None:
            self._hyperparameters.leads = receipt.lead
        if pulled is not None and receipt.outcome is Outcome.APPLIED:
            # of a push that was not, the edits stay differences here and travel with the next
            self._hyperparameters.write(self._groups(), pulled.header.groups, since)
        self._hyperparameters.warn_ignored(receipt)
        self._extras.stepped()

    def _finish(self) -> None:
        """The session is being closed."""
        if self._overlap is not None:
            self._overlap.stop()
        try:
            self.synchronize()
        except PushstepError as error:
            caller.warn(f"the last step failed: {error.message}")
        self._extras.send_if_possible()

    @property
    def overlapped_steps(self) -> int:
        """How many steps only had to commit gradients that had left during backward."""
        return 0 if self._overlap is None else self._overlap.steps

    def zero_grad(self, set_to_none: bool = True) -> None:
        """torch's. Gradients that have left already are taken back."""
        if self._overlap is not None:
            self._overlap.supersede()
        super().zero_grad(set_to_none)

    def _edited(self) -> str | None:
        """The name of a parameter that is not as the server's version left it."""
        written = self._parameters.written()
        if written is None or self._parameters.are(self._session.pull_message(None)):
            return (
                None  # a checkpoint that was loaded at the version it was saved at writes and changes nothing
            )
        return written

    def _start_over(self, since: Sequence[Mapping[str, float | bool]] = ()) -> None:
        """Take the hyperparameters of the membership that was joined anew.

        The parameters are pulled next. Should that fail, they are still known to be of the timeline that they are of.
        """
        member = self._session.member()
        self._hyperparameters.leads = member.lead
        self._hyperparameters.write(self._groups(), member.groups, since)

    @shield
    def upload(self) -> int:
        """Send the parameters as they are here, as a version of their own; the version."""
        self.synchronize()
        self._settle()
        version = self._session.upload_values(self._parameters.values(self._session.member().layout))
        self._parameters.note(self._session.member().timeline, version)
        return version

    def _settle(self) -> None:
        """Take what a step that was broken off has made, if it was applied: nothing here may set it back."""
        settled = self._session.settle()
        if settled is not None and self._parameters.written() is None:
            self._start_over()
            self._parameters.take(self._session.pull_message(self._parameters.at))
            self.last_receipt = settled

    # State.

    @shield
    def state_dict(self) -> Any:
        """torch's state_dict, fetched from the server; a list of them if a list was attached.

        What torch does not keep in a group here (a scheduler's `initial_lr`) is this side's own and is merged in, and
        so are the lead's edits that the next push will carry: a scheduler has stepped since the last one.
        """
        for pre in self._optimizer_state_dict_pre_hooks.values():
            pre(self)
        self.synchronize()
        pulled = self._session.pull_state()
        groups = self._groups()
        pending = self._hyperparameters.pending(groups, self.last_receipt)
        dicts = remote_state.fetched(pulled, groups, pending, len(self._originals))
        result: Any = dicts[0] if self._single else dicts
        for post in self._optimizer_state_dict_post_hooks.values():
            replaced = post(self, result)
            result = result if replaced is None else replaced
        self._last_state_dict = copy.deepcopy(result)
        return result

    @shield
    def load_state_dict(self, state_dict: Any, *, force: bool = False) -> None:
        """Replace the optimizer state on the server, for every worker.

        Loading what `state_dict()` returned since the last step here changes nothing. While other workers live anything else
        needs `force=True`. Parameters that were written to before (a checkpoint's, loaded into the module) go with
        it; otherwise the server's stand.
        """
        for pre in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self.synchronize()
        if not (self._last_state_dict is not None and remote_state.equal(self._last_state_dict, state_dict)):
            self._load(state_dict, force)
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def _load(self, state_dict: Any, force: bool) -> None:
        dicts = [state_dict] if self._single else list(state_dict)
        if len(dicts) != len(self._originals):
            raise ValueError(f"{len(dicts)} state dicts for {len(self._originals)} optimizers")
        layout = self._session.member().layout
        groups = self._groups()
        slot_of = partial(self._parameters.slot_of, layout=layout)
        header, values = remote_state.upload_of(dicts, groups, layout, slot_of, force)
        edited = self._edited()
        if edited is not None:
            values.update(self._parameters.values(layout))
        member = self._session.replace_state(header, values)
        remote_state.keep_own_keys(dicts, groups)
        self._hyperparameters.write(self._groups(), member.groups)
        if edited is not None:
            self._parameters.note(member.timeline, member.version)
        else:
            self._parameters.take(self._session.pull_message(self._parameters.at))

    # A group more.

    @shield
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's, for the model: every worker has to add the same group. On a list of optimizers it must say `rule`."""
        if not hasattr(self, "_session"):
            super().add_param_group(param_group)  # torch's constructor adds the groups that are attached
            return
        self.synchronize()
        rule = param_group.pop("rule", self._rules[0] if self._single else None)
        if rule not in self._rules:
            rules = ", ".join(dict.fromkeys(self._rules))
            raise UnsupportedModule(problem=f"a group added here needs rule=, one of those attached: {rules}")
        # it becomes one of the last optimizer of that rule, with that optimizer's defaults
        number = max(self._optimizer_of[index] for index, known in enumerate(self._rules) if known == rule)
        own_defaults, self.defaults = self.defaults, self._originals[number].defaults
        try:
            super().add_param_group(param_group)
        finally:
            self.defaults = own_defaults
        self._rules.append(rule)
        self._optimizer_of.append(number)
        try:
            self._send_group(len(self.param_groups) - 1)
        except BaseException:
            for added in (self.param_groups, self._rules, self._optimizer_of):
                added.pop()
            raise

    def _send_group(self, index: int) -> None:
        parameters = self.param_groups[index]["params"]
        names = added_names(self.param_groups[index], index, self._module)
        manifest, values = of_added_group(self._groups()[index], index, names)
        member = self._session.add_group(manifest, values)
        self._parameters.add(values)
        self._session.memory.follow(p for group in self.param_groups for p in group["params"])
        self._lent.add(parameters)
        self._session.memory.open(member)
        if self._overlap is not None:
            self._overlap.watch(parameters)
        self._hyperparameters.write(self._groups(), member.groups)
        self._parameters.take(self._session.pull_message(None))

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "a RemoteOptimizer is a live session and cannot be pickled or copied; save its state_dict()"
        )

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__getstate__()

    def __repr__(self) -> str:
        return f"RemoteOptimizer of {self._session!r}\n{super().__repr__()}"


def named_after(optimizers: Sequence[torch.optim.Optimizer]) -> type[RemoteOptimizer]:
    """The class under the name of what was attached, if that is one: loggers make a column's name of it."""
    names = {type(optimizer).__name__ for optimizer in optimizers}
    return type(names.pop(), (RemoteOptimizer,), {}) if len(names) == 1 else RemoteOptimizer
