"""An ordinary torch optimizer to everything that holds it, whose step the server takes.

`step()` sends the gradients and the hyperparameters that were changed here since the last receipt, and writes what
comes back into the parameters. The groups are the original optimizers' own dict objects, so schedulers made before
attach go on steering them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn

import torch
from torch import nn

from pushstep.proto.errors import (
    Fenced,
    InvalidSettings,
    LocalParameterEdit,
    PushstepError,
    Superseded,
    UnsupportedModule,
)

from . import caller
from .attached import Attached
from .attachment import Attachment, Names
from .checkpoints import Checkpoints
from .metrics import Metrics
from .participant import Step
from .policy import Policy
from .prefetch import Copies, Flight
from .receipt import Outcome, Receipt
from .scaling import Scaling
from .server_state import ServerState
from .shield import shield

if TYPE_CHECKING:
    from .session import Session

Edits = Literal["sample", "check", "upload"]
EDITS: Final = ("sample", "check", "upload")


class RemoteOptimizer(torch.optim.Optimizer):
    """Made by `Session.attach`. `last_receipt` says what became of the last step."""

    _step_supports_amp_scaling = True

    def __init__(
        self,
        session: Session,
        optimizers: Sequence[torch.optim.Optimizer],
        module: nn.Module | None,
        names: Names,
        policy: Policy | None,
        *,
        single: bool,
        overlap: bool,
        prefetch: bool,
        edits: Edits,
        undo: contextlib.ExitStack,
    ) -> None:
        """What `undo` calls has it not have been made, here and on the server."""
        check_options(edits, overlap=overlap, prefetch=prefetch)
        attachment = Attachment(optimizers, module, names)
        # no defaults: they would add one rule's keys to another rule's groups
        super().__init__(attachment.settings, {})
        self.state = ServerState()
        self.defaults = dict(optimizers[0].defaults)
        self._session = session
        self._single = single
        self._sends_edits = edits == "upload"
        self._attached = Attached(
            session,
            attachment,
            lambda: self.param_groups,
            module,
            watch_whole=edits != "sample",
            overlap=overlap,
            prefetch=prefetch,
        )
        self._parameters = self._attached.parameters
        self._hyperparameters = self._attached.hyperparameters
        self._overlap = self._attached.overlap
        self._checkpoints = Checkpoints(self._attached)
        self._scaling = Scaling(self)
        self._metrics = Metrics()
        self._copies = Copies() if prefetch else None
        self._flight: tuple[Flight[Step], list[dict[str, float | bool]]] | None = None
        self.last_receipt: Receipt | None = None
        # what the last step was refused with for what is here: a code of the catalogue, or nothing
        self._told = ""
        # how many samples the next step's gradients are over: their weight in a round; 0 counts as 1
        self.samples: float = 0
        self._attached.begin(self, policy, undo)
        weakref.finalize(self, self._attached.lent.remove).atexit = False
        for task in (self._attached.lent.remove, self._finish):
            session.before_close(task)
            undo.callback(session.not_before_close, task)

    @property
    def values_from(self) -> str:
        """Whose values this began with: "worker" if attach created the model from them, "server" if it was there."""
        return self._attached.values_from

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
        for optimizer in self._attached.optimizers:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # for schedulers made before attach
        with shield, self._scaling:
            self._exchange(loss)
        return loss

    def _exchange(self, loss: Any) -> None:
        ranks = self._session.ranks
        if not ranks.looked:
            ranks.look(self._session.member().policy)
        try:
            self._attached.follow()
            edited = self._attached.edited()
            if edited and not self._may_send_edits():
                self._check_current()
                ranks.refuse_wrapper()  # whose broadcast it then was
                raise LocalParameterEdit(parameter=edited[0])
        except PushstepError as error:
            self._told = error.code
            raise
        self._told = ""
        computed_on = self._parameters.at
        self.synchronize()
        if edited or self._parameters.fresh:
            self._attached.send_edits(edited)
            computed_on = self._parameters.at
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
                self._metrics.take(loss), self._hyperparameters.edits(self._attached.groups), self.samples
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
            since = [group.values() for group in self._attached.groups]
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
            self._take(flight.land, since, into_parameters=not self._parameters.seem_written())

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
            self._attached.start_over()
            self._parameters.take(self._session.pull_message(self._parameters.at))
            raise
        self.last_receipt = receipt
        self._checkpoints.forget()
        if pulled is None and receipt.timeline != self._session.member().timeline:
            self._attached.start_over()
        elif pulled is None and receipt.outcome is Outcome.APPLIED:
            self._attached.start_over(since)  # joining again has settled it, and brought the groups
        if into_parameters and pulled is not None:
            self._parameters.take(pulled)
        elif into_parameters and receipt.reason != Fenced.code:  # who is fenced is told nothing more
            self._parameters.take(self._session.pull_message(self._parameters.at))
        if pulled is not None:
            self._hyperparameters.leads = receipt.lead
        if pulled is not None and receipt.outcome is Outcome.APPLIED:
            # of a push that was not, the edits stay differences here and travel with the next
            self._hyperparameters.write(self._attached.groups, pulled.header.groups, since)
        self._hyperparameters.warn_ignored(receipt)
        self._attached.extras.stepped()

    def _may_send_edits(self) -> bool:
        """What is written before the first step may be the other half of a checkpoint, whose state attach did not take."""
        return self._sends_edits and not self._attached.state_discarded

    def _check_current(self) -> None:
        """Fenced or ModelLost where what is here is nobody's edit: another session may have written it."""
        self._session.pull_message(self._parameters.at)

    def _finish(self) -> None:
        """The session is being closed."""
        if self._overlap is not None:
            self._overlap.stop()
        try:
            self.synchronize()
        except PushstepError as error:
            caller.warn(f"the last step failed: {error.message}")
        self._finish_edits()
        self._attached.extras.send_if_possible()

    def _finish_edits(self) -> None:
        """What was written to parameters after the last step goes up, or is said."""
        try:
            self._attached.follow()
            edited = self._attached.edited()
            if not edited or self._may_send_edits():
                if edited or self._parameters.fresh:
                    self._attached.send_edits(edited)
            elif self._told != LocalParameterEdit.code:
                self._check_current()
                caller.warn(
                    f"parameter {edited[0]!r} was changed here after the last step, and the server has not seen it; "
                    'attach(..., edits="upload") or session.upload() before close() sends it'
                )
        except Fenced:
            return  # its name is another's, and so may be what was written
        except PushstepError as error:
            if self._told != error.code:
                caller.warn(f"what was changed here after the last step is lost: {error.message}")

    def unsent_edits(self) -> dict[int, dict[str, float | bool]]:
        """What was changed in the groups since the last push, if this worker leads: a scheduler's last step."""
        return self._hyperparameters.unsent(self._attached.groups)

    def warn_ignored(self, ignored: Sequence[str]) -> None:
        """Say that edits did not count with which the session left."""
        self._hyperparameters.warn_ignored_at_leave(ignored)

    @property
    def overlapped_steps(self) -> int:
        """How many steps only had to commit gradients that had left during backward."""
        return 0 if self._overlap is None else self._overlap.steps

    def zero_grad(self, set_to_none: bool = True) -> None:
        """torch's. Gradients that have left already are taken back."""
        if self._overlap is not None:
            self._overlap.supersede()
        super().zero_grad(set_to_none)

    @shield
    def upload(self) -> int:
        """Send the parameters as they are here, as a version of their own; the version."""
        self._attached.follow()
        self.synchronize()
        self._settle()
        self._told = ""
        return self._attached.upload()

    def _settle(self) -> None:
        """Take what a step that was broken off has made, if it was applied: nothing here may set it back."""
        settled = self._session.settle()
        if settled is not None and not self._parameters.seem_written():
            self._attached.start_over()
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
        self._attached.follow()
        self.synchronize()
        dicts = self._checkpoints.fetch(self.last_receipt)
        result: Any = dicts[0] if self._single else dicts
        for post in self._optimizer_state_dict_post_hooks.values():
            replaced = post(self, result)
            result = result if replaced is None else replaced
        self._checkpoints.returned(result)
        return result

    @shield
    def load_state_dict(self, state_dict: Any, *, force: bool = False) -> None:
        """Replace the optimizer state on the server, for every worker.

        Loading what `state_dict()` returned since the last step here changes nothing but the groups' values, which become
        those of then. While other workers live anything else needs `force=True`. Parameters that were written to before
        (a checkpoint's, loaded into the module) go with it, and so do those that attach has overwritten, if no step was
        taken since: a state belongs to the values that it was saved with. Otherwise the server's stand.
        """
        for pre in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        self._attached.follow()
        self.synchronize()
        dicts = [state_dict] if self._single else list(state_dict)
        self._checkpoints.load(dicts, whole=state_dict, force=force)
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    # A group more.

    @shield
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's, for the model: every worker has to add the same group. On a list of optimizers it must say `rule`."""
        if not hasattr(self, "_session"):
            super().add_param_group(param_group)  # torch's constructor adds the groups that are attached
            return
        self._attached.follow()
        self.synchronize()
        rules = self._attached.rules
        rule = param_group.pop("rule", rules[0] if self._single else None)
        if rule not in rules:
            raise UnsupportedModule(
                problem=f"a group added here needs rule=, one of those attached: {', '.join(dict.fromkeys(rules))}"
            )
        # it becomes one of the last optimizer of that rule, with that optimizer's defaults
        number = max(n for n, known in zip(self._attached.optimizer_of, rules, strict=True) if known == rule)
        own_defaults, self.defaults = self.defaults, self._attached.optimizers[number].defaults
        with contextlib.ExitStack() as undo:
            try:
                super().add_param_group(param_group)
            finally:
                self.defaults = own_defaults
            undo.callback(self.param_groups.pop)
            self._attached.add_group(rule, number, undo)
            shield.check()  # while it can be undone
            undo.pop_all()

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "a RemoteOptimizer is a live session and cannot be pickled or copied; save its state_dict()"
        )

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__getstate__()

    def __repr__(self) -> str:
        return f"RemoteOptimizer of {self._session!r}\n{super().__repr__()}"


def check_options(edits: str, *, overlap: bool, prefetch: bool) -> None:
    """UnsupportedModule or InvalidSettings for options of attach that do not go together."""
    if overlap and prefetch:
        raise UnsupportedModule(
            problem="with prefetch the whole exchange overlaps the next step's compute: attach without overlap"
        )
    if edits not in EDITS:
        raise InvalidSettings(problem=f"edits={edits!r}: it is one of {', '.join(EDITS)}")
    if edits == "upload" and prefetch:
        raise InvalidSettings(
            problem='with prefetch the parameters here are a step behind the server\'s, so edits="upload" would undo the step '
            "that is on its way: attach without one of them"
        )


def named_after(optimizers: Sequence[torch.optim.Optimizer]) -> type[RemoteOptimizer]:
    """The class under the name of what was attached, if that is one: loggers make a column's name of it."""
    names = {type(optimizer).__name__ for optimizer in optimizers}
    return type(names.pop(), (RemoteOptimizer,), {}) if len(names) == 1 else RemoteOptimizer
