"""A torch optimizer whose step the server takes.

`step()` sends the gradients, and the hyperparameters that were changed here since the last receipt. It writes the
returned values into the parameters. The groups are the original optimizers' own dict objects, so schedulers made
before attach continue to steer them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from torch._compile import _disable_dynamo

from pushstep.proto.errors import Fenced, LocalParameterEdit, PushstepError, Superseded, UnsupportedModule

from ..attachment.attachment import Attachment, Names
from ..membership.policy import Policy
from ..membership.receipt import Outcome, Receipt
from ..transport.shield import shield
from ..transport.streams import Pulled
from ..warn import warn
from ..worker.flight import Copies, Flight
from ..worker.worker import Step, Worker
from .attached import Attached
from .checkpoints import Checkpoints
from .grad_scaler import Scaling
from .metrics import Metrics
from .options import Edits, Progress, Telling, check_options
from .server_state import ServerState
from .summary import shown, summary


class RemoteOptimizer(torch.optim.Optimizer):
    """Made by `Session.attach`. Owns the attached parameters; `last_receipt` is the last step's receipt."""

    _step_supports_amp_scaling = True

    def __init__(
        self,
        session: object,
        worker: Worker,
        optimizers: Sequence[torch.optim.Optimizer],
        module: nn.Module | None,
        names: Names,
        policy: Policy | None,
        *,
        single: bool,
        overlap: bool,
        prefetch: bool,
        edits: Edits,
        progress: Progress | None,
        undo: contextlib.ExitStack,
    ) -> None:
        """Registers in `undo` the calls that reverse attaching, here and on the server. `session` is kept open."""
        check_options(edits, overlap=overlap, prefetch=prefetch, progress=progress)
        attachment = Attachment(optimizers, module, names)
        # no defaults: torch would add one rule's keys to another rule's groups
        super().__init__(attachment.settings, {})
        self.state = ServerState()
        self.defaults = dict(optimizers[0].defaults)
        self._session = session
        self._worker = worker
        self._single = single
        self._sends_edits = edits == "upload"
        self._telling = Telling(progress)
        self._attached = Attached(
            worker,
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
        # catalogue code of the local problem for which the last step was refused, else ""
        self._refused_for = ""
        # number of samples behind the next step's gradients: their weight in a round; 0 counts as 1
        self.samples: float = 0
        self._attached.begin(self, policy, undo)
        weakref.finalize(self, self._attached.in_place.remove).atexit = False
        for task in (self._attached.in_place.remove, self._finish):
            worker.before_close(task)
            undo.callback(worker.not_before_close, task)

    @property
    def values_from(self) -> str:
        """Whose values training began with: "worker" if attach created the model, "server" if the model existed."""
        return self._attached.values_from

    # The step.

    @_disable_dynamo  # torch.compile ends its graph in front of a step; public, it would import dynamo at once
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Send the gradients, let the server step, and take the parameters back. Returns the closure's loss, or None.

        A parameter whose grad is None is not in the push; with no gradient at all nothing is sent. With `prefetch` the
        parameters that come back, and the errors that are raised, are those of the step before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self._attached.optimizers:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # for schedulers made before attach
        with shield, self._scaling, self._worker.spans.span("step", model=self._worker.model):
            self._exchange(loss)
        self._telling.tell(self.last_receipt)
        return loss

    def _exchange(self, loss: Any) -> None:
        ranks = self._worker.ranks
        if not ranks.looked:
            ranks.look(self._worker.member().policy)
        try:
            self._attached.follow()
            edited = self._attached.edited()
            if edited and not self._may_send_edits():
                # Fenced or ModelLost: another session may have written the parameters
                self._worker.pull_message(self._parameters.at)
                ranks.refuse_wrapper()  # a wrapper's broadcast may have written it
                raise LocalParameterEdit(parameter=edited[0])
        except PushstepError as error:
            self._refused_for = error.code
            raise
        self._refused_for = ""
        computed_on = self._parameters.at
        if self._flight is not None:
            self._land()
        if edited or self._parameters.fresh:
            self._attached.send_edits(edited)
            computed_on = self._parameters.at
        layout = self._worker.member().layout
        gradients = self._parameters.gradients(layout)
        # unscales before the early push is compared: the gradients that left early were not unscaled
        skip = self._scaling.skips(gradients.values())
        if skip:
            gradients = {}
        early = self._overlap.take(gradients, layout) if self._overlap is not None else None
        if not gradients and not skip:
            return
        groups = self._attached.groups
        commit = self._worker.commit(
            self._metrics.take(loss), self._hyperparameters.edits(groups), self.samples
        )
        onto = self._parameters.at
        if self._copies is not None:
            copies = self._copies.of(gradients, self._worker.compression.rounds_to)
            send = partial(self._worker.step, copies, computed_on, commit, skip=skip, pull=True, onto=onto)
            self._flight = self._worker.fly(send), [group.values() for group in groups]
            return
        try:
            receipt, pulled = self._worker.step(
                gradients, computed_on, commit, skip=skip, pull=True, early=early, onto=onto
            )
        except Superseded:
            self._start_over()
            raise
        finally:
            if early is not None:
                early.withdraw()
        self._take(receipt, pulled)

    def report(self, **metrics: Any) -> None:
        """Send these numbers with the next step, such as loss=..., for hooks (ReduceLROnPlateau) and operators.

        A closure's loss is sent automatically. Raises TypeError for a value that is not one number.
        """
        self._metrics.report(metrics)

    def synchronize(self) -> None:
        """With `prefetch`: wait for the push in flight and take its answer, as the next `step()` would.

        Raises the error with which that push was refused. Call it after the last step, and before reading parameters.
        """
        self._land()
        self._telling.tell(self.last_receipt)

    @shield
    def _land(self) -> None:
        if self._flight is not None:
            self._worker.wait_for_flight()  # may be interrupted and called again
            (flight, since), self._flight = self._flight, None
            # keep local writes: the next step refuses them, or they are being uploaded
            into_parameters = not self._parameters.seem_written()
            try:
                receipt, pulled = flight.land()
            except Superseded:
                self._start_over()
                raise
            self._take(receipt, pulled, since, into_parameters=into_parameters)

    def _start_over(self) -> None:
        """Take what a restore, of which the user is told by Superseded, has made of the model."""
        self._attached.start_over()
        self._parameters.take(self._worker.pull_message(self._parameters.at))

    def _take(
        self,
        receipt: Receipt,
        pulled: Pulled | None,
        since: Sequence[Mapping[str, float | bool]] = (),
        *,
        into_parameters: bool = True,
    ) -> None:
        """Take a step's answer; `since`: the groups' values when it was sent, if that was an earlier step."""
        self.last_receipt = receipt
        self._checkpoints.forget()
        if pulled is None and receipt.timeline != self._worker.member().timeline:
            self._attached.start_over()
        elif pulled is None and receipt.outcome is Outcome.APPLIED:
            self._attached.start_over(since)  # joining again resolved the push and brought the groups
        if into_parameters and pulled is not None:
            self._parameters.take(pulled)
        elif into_parameters and receipt.reason != Fenced.code:  # a fenced worker gets no more answers
            self._parameters.take(self._worker.pull_message(self._parameters.at))
        if pulled is not None:
            self._hyperparameters.leads = receipt.lead
            if receipt.outcome is Outcome.APPLIED:
                self._hyperparameters.write(self._attached.groups, pulled.header.groups, since)
            else:
                self._hyperparameters.write_around_edits(self._attached.groups, pulled.header.groups)
        if receipt.ignored_edits:
            self._hyperparameters.warn_ignored(receipt)
        self._attached.extras.stepped()

    def _may_send_edits(self) -> bool:
        """True if edits="upload", unless the edits may belong to a checkpoint whose state attach discarded."""
        return self._sends_edits and not self._attached.state_discarded

    def _finish(self) -> None:
        """Land the last push and send what is left; runs before the session closes."""
        if self._overlap is not None:
            self._overlap.stop()
        try:
            self._land()
        except PushstepError as error:
            warn(f"the last step failed: {error.message}")
        self._telling.tell_or_warn(self.last_receipt)
        self._finish_edits()
        self._attached.extras.send_if_possible()

    def _finish_edits(self) -> None:
        """Upload parameters that were written to after the last step, or warn about them."""
        try:
            self._attached.follow()
            edited = self._attached.edited()
            if not edited or self._may_send_edits():
                if edited or self._parameters.fresh:
                    self._attached.send_edits(edited)
            elif self._refused_for != LocalParameterEdit.code:
                self._worker.pull_message(self._parameters.at)
                warn(
                    f"parameter {edited[0]!r} was changed here after the last step, and the server has not seen it; "
                    'attach(..., edits="upload") or session.upload() before close() sends it'
                )
        except Fenced:
            return  # another session has the name, and may have written the parameters
        except PushstepError as error:
            if self._refused_for != error.code:
                warn(f"what was changed here after the last step is lost: {error.message}")

    def unsent_edits(self) -> dict[int, dict[str, float | bool]]:
        """The groups' changes since the last push, if this worker leads, such as a scheduler's last step."""
        return self._hyperparameters.unsent(self._attached.groups)

    def warn_ignored(self, ignored: Sequence[str]) -> None:
        """Warn about edits that the session sent when it left and that the server ignored."""
        self._hyperparameters.warn_ignored_at_leave(ignored)

    @property
    def overlapped_steps(self) -> int:
        """Number of steps that only committed gradients which had left during backward."""
        return 0 if self._overlap is None else self._overlap.steps

    def zero_grad(self, set_to_none: bool = True) -> None:
        """torch's zero_grad; also withdraws gradients that left during backward."""
        if self._overlap is not None:
            self._overlap.supersede()
        super().zero_grad(set_to_none)

    @shield
    def upload(self) -> int:
        """Send the local parameters as a version of their own; return the version."""
        self._attached.follow()
        self.synchronize()
        self._settle()
        self._refused_for = ""
        return self._attached.upload()

    def _settle(self) -> None:
        """Resolve an interrupted step and pull its result if it was applied, or else an upload would undo it."""
        settled = self._worker.membership.settle()
        if settled is not None and not self._parameters.seem_written():
            self._attached.start_over()
            self._parameters.take(self._worker.pull_message(self._parameters.at))
            self.last_receipt = settled

    # State.

    @shield
    def state_dict(self) -> Any:
        """Return torch's state_dict, fetched from the server; a list of them if a list was attached.

        Group keys that the server does not know (a scheduler's `initial_lr`) are merged in from here. So are the lead's
        edits that the next push will carry, because a scheduler has stepped since the last push.
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

        Loading what `state_dict()` returned since the last step only resets the groups' values to the saved ones. While
        other workers live, anything else needs `force=True`. Parameters that were written to before (a checkpoint, loaded
        into the module) go with the state, since a state belongs to the values that it was saved with. So do those that
        attach has overwritten, if no step was taken since. Otherwise the server's parameters stand.
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

    # Adding a group.

    @shield
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the model; every worker must add the same one. With a list of optimizers it must name `rule`."""
        if not hasattr(self, "_worker"):
            super().add_param_group(param_group)  # called by torch's constructor for the attached groups
            return
        self._attached.follow()
        self.synchronize()
        rules = self._attached.rules
        rule = param_group.pop("rule", rules[0] if self._single else None)
        if rule not in rules:
            raise UnsupportedModule(
                problem=f"a group added here needs rule=, one of those attached: {', '.join(dict.fromkeys(rules))}"
            )
        # the group joins the last optimizer of that rule and takes that optimizer's defaults
        number = max(n for n, known in zip(self._attached.optimizer_of, rules, strict=True) if known == rule)
        own_defaults, self.defaults = self.defaults, self._attached.optimizers[number].defaults
        with contextlib.ExitStack() as undo:
            try:
                super().add_param_group(param_group)
            finally:
                self.defaults = own_defaults
            undo.callback(self.param_groups.pop)
            self._attached.add_group(rule, number, undo)
            shield.check()  # an interrupt here still undoes the group
            undo.pop_all()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a RemoteOptimizer is a live session and cannot be pickled or copied; save its state_dict()"
        )

    def __repr__(self) -> str:
        return f"RemoteOptimizer of {self._session!r}, {'; '.join(summary(self.param_groups))}"

    def _repr_html_(self) -> str:
        return shown(repr(self._session), self.param_groups, self.last_receipt)


def named_after(optimizers: Sequence[torch.optim.Optimizer]) -> type[RemoteOptimizer]:
    """RemoteOptimizer under the attached class's name, if there is only one: loggers name a column after it."""
    names = {type(optimizer).__name__ for optimizer in optimizers}
    return type(names.pop(), (RemoteOptimizer,), {}) if len(names) == 1 else RemoteOptimizer
