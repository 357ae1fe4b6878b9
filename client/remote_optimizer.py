"""An ordinary torch optimizer to everything that holds it, whose step the server takes.

`step()` sends the gradients and the hyperparameters that were changed here since the last receipt, and writes what
comes back into the parameters. The groups are the original optimizers' own dict objects, so schedulers made before
attach go on steering them.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from pushstep.optim import RULES
from pushstep.optim.state_dict import GroupState, ParameterState, parts_of, torch_state_dict
from pushstep.proto import dtypes
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import LocalParameterEdit, NotAttached, UnsupportedModule
from pushstep.proto.layout import Layout, Slot
from pushstep.proto.types_pb2 import GroupValues, Manifest, Parameter, ParamGroup

from .gradients import Rows, as_gradient
from .names import check_parameter, clean, parameter_names
from .receipt import Outcome, Receipt, plain_values, wire_value
from .transport import Pulled

if TYPE_CHECKING:
    from .session import Session

_HOOK_TABLES = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


# Buffers (batch statistics) are small and only checkpoints need them: now and then, and at the end.
EXTRAS_EVERY_STEPS = 100


class RemoteOptimizer(torch.optim.Optimizer):
    """Made by `Session.attach`. `last_receipt` says what became of the last step."""

    def __init__(
        self,
        session: Session,
        optimizers: Sequence[torch.optim.Optimizer],
        module: nn.Module | None,
        names: Sequence[str] | Mapping[Tensor, str] | None,
        *,
        single: bool,
    ) -> None:
        if not optimizers:
            raise UnsupportedModule(problem="attach needs at least one optimizer")
        self._rules = [rule_of(optimizer) for optimizer in optimizers for _ in optimizer.param_groups]
        self._optimizer_of = [i for i, optimizer in enumerate(optimizers) for _ in optimizer.param_groups]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        seen: set[int] = set()
        for parameter in (p for group in groups for p in group["params"]):
            if id(parameter) in seen:
                raise UnsupportedModule(problem="a parameter is in two optimizers or twice in one")
            seen.add(id(parameter))
        # no defaults: they would add one rule's keys to another rule's groups
        super().__init__(groups, {})
        self.defaults = dict(optimizers[0].defaults)
        self._session = session
        self._single = single
        self._originals = list(optimizers)
        self._module = module
        found, aliases = parameter_names(optimizers, module, names)
        self._parameters = dict(zip(found, (p for group in groups for p in group["params"]), strict=True))
        for name, parameter in self._parameters.items():
            check_parameter(parameter, name)
        self._names = {id(parameter): name for name, parameter in self._parameters.items()}
        self._held: tuple[int, int] | None = None
        self._versions: dict[str, int] = {}
        self._values: list[dict[str, float | bool]] = []
        self._last_state_dict: Any = None
        self._warned_edits = False
        self.last_receipt: Receipt | None = None
        self._join(self._manifest(found, aliases))
        self._take_over(optimizers)
        self._steps = 0
        self._send_extras()
        session.before_close(self._send_extras)

    # Becoming the model's, or the model becoming ours.

    def _manifest(self, names: Sequence[str], aliases: Sequence[Sequence[str]]) -> Manifest:
        manifest = Manifest()
        number = 0
        for index, group in enumerate(self.param_groups):
            manifest.groups.append(self._group_message(index))
            for parameter in group["params"]:
                manifest.parameters.append(
                    _parameter_message(names[number], parameter, index, aliases[number])
                )
                number += 1
        return manifest

    def _group_message(self, index: int) -> ParamGroup:
        values = {name: wire_value(v) for name, v in self._current(index).items()}
        return ParamGroup(rule=self._rules[index], optimizer=self._optimizer_of[index], values=values)

    def _join(self, manifest: Manifest) -> None:
        states = {
            self._names[id(parameter)]: state
            for optimizer in self._originals
            for parameter, state in optimizer.state.items()
            if state and float(state.get("step", 0)) > 0
        }
        steps = [int(states.get(p.name, {}).get("step", 0)) for p in manifest.parameters] if states else []

        def values(layout: Layout) -> dict[tuple[Slot, str], Tensor]:
            found: dict[tuple[Slot, str], Tensor] = {}
            for slot in layout.slots:
                found[slot, ""] = self._parameters[slot.name]
                for name in RULES[self._rules[slot.group]].state_names:
                    if slot.name in states:
                        found[slot, name] = states[slot.name][name]
            return found

        mine = [self._current(index) for index in range(len(self.param_groups))]
        created = self._session.join_or_create(manifest, values, steps)
        member = self._session.member()
        if created:
            self._held = (member.timeline, member.version)
            self._note_versions()
        else:
            self._apply(self._session.pull_message(None))
        self._leads = member.lead
        self._write_groups(member.groups)
        theirs = [self._current(index) for index in range(len(self.param_groups))]
        if mine != theirs:
            differing = sorted({k for a, b in zip(mine, theirs, strict=True) for k in a if a[k] != b.get(k)})
            warnings.warn(
                f"model {self._session.model!r} has other values of {', '.join(differing)} than this worker's optimizer; "
                "the server's hold",
                RuntimeWarning,
                stacklevel=4,
            )

    def _take_over(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        for number, optimizer in enumerate(optimizers):
            for table in _HOOK_TABLES:
                if number == 0:  # the table itself, so that handles from before still remove their hooks
                    setattr(self, table, getattr(optimizer, table))
                    setattr(optimizer, table, OrderedDict())
                else:
                    getattr(self, table).update(getattr(optimizer, table))
                    getattr(optimizer, table).clear()
            optimizer.state.clear()
            optimizer.step = _refuse_step  # type: ignore[method-assign]

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Send the gradients; the server steps; the parameters come back. The closure's loss, if there is one.

        A parameter whose grad is None is not in the push; with no gradient at all nothing is sent.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self._originals:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # for schedulers made before attach
        layout = self._session.member().layout
        self._check_unedited()
        gradients: dict[Slot, Tensor | Rows] = {}
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                slot = layout.slot(name, self._session.model)
                gradients[slot] = as_gradient(parameter.grad, slot)
        if not gradients:
            return loss
        held = self._held or (0, 0)
        receipt, pulled = self._session.step(
            gradients,
            held[1],
            edits=self._edits(),
            metrics=_metrics(loss),
            pull=self._session.pull_options(self._held),
        )
        self.last_receipt = receipt
        if receipt.outcome is Outcome.SUPERSEDED:
            self._held = None
            self._leads = self._session.member().lead
            self._write_groups(self._session.member().groups)
        self._apply(pulled if pulled is not None else self._session.pull_message(self._held))
        if pulled is not None:
            self._leads = receipt.lead
            self._write_groups(pulled.header.groups)
        self._warn_ignored(receipt)
        self._steps += 1
        if self._steps % EXTRAS_EVERY_STEPS == 0:
            self._send_extras()
        return loss

    def _send_extras(self) -> None:
        """What a checkpoint of the module needs beside the parameters that are stepped; the lead's business."""
        if self._module is None or not self._session.member().lead:
            return
        stepped = {
            name for slot in self._session.member().layout.slots for name in (slot.name, *slot.aliases)
        }
        extras = {
            clean(name): value
            for name, value in self._module.state_dict().items()
            if isinstance(value, Tensor) and clean(name) not in stepped
        }
        if extras:
            self._session.upload_extras(extras)

    def _check_unedited(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter._version != self._versions[name]:
                raise LocalParameterEdit(parameter=name)

    def _note_versions(self) -> None:
        self._versions = {name: parameter._version for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def _apply(self, pulled: Pulled) -> None:
        # a group that another worker has added meanwhile is not this one's yet: the next push says so
        for slot, _, values in pulled.dense():
            if slot.name in self._parameters:
                self._parameters[slot.name].copy_(values)
        for slot, ids, rows in pulled.rows():
            if slot.name not in self._parameters:
                continue
            parameter = self._parameters[slot.name]
            parameter.index_copy_(0, ids.to(parameter.device), rows.to(parameter.device, parameter.dtype))
        self._held = (pulled.header.timeline, pulled.header.version)
        self._note_versions()

    def upload(self) -> int:
        """Send the parameters as they are here, as a version of their own; the version."""
        layout = self._session.member().layout
        values = {
            (layout.slot(name, self._session.model), ""): parameter
            for name, parameter in self._parameters.items()
        }
        version = self._session.upload_values(values)
        self._held = (self._session.member().timeline, version)
        self._note_versions()
        return version

    # Hyperparameters.

    def _current(self, index: int) -> dict[str, float | bool]:
        """A group's hyperparameters here, as numbers; keys that its rule does not have are this side's own."""
        group = self.param_groups[index]
        rule = RULES[self._rules[index]]
        return {
            name: bool(group[name]) if isinstance(default, bool) else float(group[name])
            for name, default in rule.defaults.items()
            if name in group
        }

    def _edits(self) -> dict[int, dict[str, float | bool]]:
        edits = {}
        for index, known in enumerate(self._values):
            group = self.param_groups[index]
            changed = {
                k: v for k, v in self._current(index).items() if not _same(group[k], known.get(k, math.nan))
            }
            if changed:
                edits[index] = changed
        return edits

    def _pending(self, index: int) -> dict[str, float | bool]:
        """A group's edits that the next push will carry and that, as far as is known here, will count."""
        ignored = self.last_receipt.ignored_edits if self.last_receipt is not None else ()
        edits = self._edits().get(index, {}) if self._leads else {}
        return {name: value for name, value in edits.items() if f"{index}.{name}" not in ignored}

    def _write_groups(self, groups: Iterable[GroupValues]) -> None:
        self._values = [plain_values(group) for group in groups][: len(self.param_groups)]
        for group, values in zip(self.param_groups, self._values, strict=True):
            for name, value in values.items():
                if isinstance(group.get(name), Tensor):
                    group[name].fill_(value)
                elif group.get(name) != value:
                    group[name] = value

    def _warn_ignored(self, receipt: Receipt) -> None:
        if receipt.ignored_edits and not self._warned_edits:
            self._warned_edits = True
            who = "an operator or a hook holds them" if receipt.lead else "only the lead worker's count"
            warnings.warn(
                f"hyperparameter edits of this worker were ignored ({', '.join(receipt.ignored_edits)}): {who}",
                RuntimeWarning,
                stacklevel=5,  # out of step and of the two wrappers that torch puts around it
            )

    # State.

    def state_dict(self) -> Any:
        """torch's state_dict, fetched from the server; a list of them if a list was attached.

        What torch does not keep in a group here (a scheduler's `initial_lr`) is this side's own and is merged in, and
        so are the lead's edits that the next push will carry: a scheduler has stepped since the last one.
        """
        for pre in self._optimizer_state_dict_pre_hooks.values():
            pre(self)
        pulled = self._session.pull_state()
        steps = list(pulled.header.steps)
        tensors: dict[int, dict[str, Tensor]] = {slot.index: {} for slot in pulled.layout.slots}
        for slot, state, values in pulled.dense():
            if state:
                tensors[slot.index][state] = values
        groups = [
            GroupState(rule, {**plain_values(group), **self._pending(index)})
            for index, (rule, group) in enumerate(zip(self._rules, pulled.header.groups, strict=False))
        ]
        for slot in pulled.layout.slots:
            if slot.group < len(groups):
                groups[slot.group].parameters.append(ParameterState(steps[slot.index], tensors[slot.index]))
        dicts = []
        for number in range(len(self._originals)):
            mine = [i for i, optimizer in enumerate(self._optimizer_of) if optimizer == number]
            made = torch_state_dict([groups[i] for i in mine])
            for entry, index in zip(made["param_groups"], mine, strict=True):
                for key, value in self.param_groups[index].items():
                    if key in entry and key != "params" and isinstance(value, Tensor):
                        entry[key] = torch.full_like(value, entry[key])
                    elif key not in RULES[self._rules[index]].defaults and key != "params":
                        entry[key] = value
            dicts.append(made)
        result: Any = dicts[0] if self._single else dicts
        for post in self._optimizer_state_dict_post_hooks.values():
            replaced = post(self, result)
            result = result if replaced is None else replaced
        self._last_state_dict = copy.deepcopy(result)
        return result

    def load_state_dict(self, state_dict: Any, *, force: bool = False) -> None:
        """Replace the optimizer state on the server, for every worker.

        Loading what `state_dict()` last returned here changes nothing. While other workers live anything else
        needs `force=True`.
        """
        for pre in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        if not (self._last_state_dict is not None and _equal(self._last_state_dict, state_dict)):
            self._load(state_dict, force)
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def _load(self, state_dict: Any, force: bool) -> None:
        dicts = [state_dict] if self._single else list(state_dict)
        if len(dicts) != len(self._originals):
            raise ValueError(f"{len(dicts)} state dicts for {len(self._originals)} optimizers")
        header = pb.UploadHeader(kind=pb.UPLOAD_KIND_STATE, force=force)
        layout = self._session.member().layout
        values: dict[tuple[Slot, str], Tensor] = {}
        steps = [0] * len(layout.slots)
        for number, entry in enumerate(dicts):
            mine = [i for i, optimizer in enumerate(self._optimizer_of) if optimizer == number]
            parts = parts_of(entry, [self._rules[i] for i in mine])
            for index, part in zip(mine, parts, strict=True):
                parameters = self.param_groups[index]["params"]
                if len(parameters) != len(part.parameters):
                    raise ValueError(
                        "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
                    )
                header.groups.append(
                    GroupValues(group=index, values={name: wire_value(v) for name, v in part.values.items()})
                )
                for parameter, state in zip(parameters, part.parameters, strict=True):
                    slot = layout.slot(self._names[id(parameter)], self._session.model)
                    steps[slot.index] = state.steps
                    rule = RULES[self._rules[index]]
                    for name in rule.state_names:
                        fresh = torch.full(
                            slot.shape, rule.initial_value(name, {**rule.defaults, **part.values})
                        )
                        values[slot, name] = _shaped(state.tensors.get(name, fresh), slot, name)
        header.steps.extend(steps)
        member = self._session.replace_state(header, values)
        for number, entry in enumerate(dicts):
            mine = [i for i, optimizer in enumerate(self._optimizer_of) if optimizer == number]
            for index, saved in zip(mine, entry["param_groups"], strict=True):
                self._keep_own_keys(index, saved)
        self._held = None
        self._write_groups(member.groups)
        self._apply(self._session.pull_message(None))

    def _keep_own_keys(self, index: int, saved: Mapping[str, Any]) -> None:
        rule = RULES[self._rules[index]]
        for key, value in saved.items():
            if key not in rule.defaults and key not in ("params", "param_names"):
                self.param_groups[index][key] = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's, for the model: every worker has to add the same group. On a list of optimizers it must say `rule`."""
        if not hasattr(self, "_session"):
            super().add_param_group(param_group)  # torch's constructor adds the groups that are attached
            return
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
        names = [f"{index}.{number}" for number in range(len(parameters))]
        if self._module is not None:
            known = {id(parameter): clean(name) for name, parameter in self._module.named_parameters()}
            names = [known.get(id(p), name) for p, name in zip(parameters, names, strict=True)]
        values = dict(zip(names, parameters, strict=True))
        manifest = Manifest(groups=[self._group_message(index)])
        for name, parameter in values.items():
            check_parameter(parameter, name)
            manifest.parameters.append(_parameter_message(name, parameter, index, ()))
        member = self._session.add_group(manifest, values)
        self._parameters.update(values)
        self._names.update({id(parameter): name for name, parameter in values.items()})
        self._write_groups(member.groups)
        self._apply(self._session.pull_message(None))

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "a RemoteOptimizer is a live session and cannot be pickled or copied; save its state_dict()"
        )

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__getstate__()

    def __repr__(self) -> str:
        return f"RemoteOptimizer of {self._session!r}\n{super().__repr__()}"


def rule_of(optimizer: torch.optim.Optimizer) -> str:
    """The server's name of an optimizer's rule. UnsupportedModule for one that it does not have."""
    for kind, name in ((torch.optim.Adadelta, "adadelta"), (torch.optim.Adagrad, "adagrad")):
        if isinstance(optimizer, kind):
            return name
    raise UnsupportedModule(
        problem=f"{type(optimizer).__name__} is not a rule that the server steps; use Adadelta or Adagrad"
    )


def _refuse_step(*_: object, **__: object) -> NoReturn:
    raise NotAttached(
        problem="this optimizer was attached to a server: call step() of what attach() returned"
    )


# schedulers look for their own mark on the step that they wrapped
_refuse_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]


def _parameter_message(name: str, parameter: Tensor, group: int, aliases: Sequence[str]) -> Parameter:
    dtype = dtypes.to_wire(parameter.dtype, f"parameter {name!r}")
    return Parameter(name=name, shape=parameter.shape, dtype=dtype, group=group, aliases=aliases)


def _same(value: Any, known: float | bool) -> bool:
    """Whether a group's value is `known`; of a tensor, whether it is what `known` becomes in its dtype."""
    if isinstance(value, Tensor):
        return bool(value == torch.full_like(value, known))
    return bool(value == known)


def _metrics(loss: Any) -> dict[str, float]:
    if isinstance(loss, (int, float)) or (isinstance(loss, Tensor) and loss.numel() == 1):
        return {"loss": float(loss)}
    return {}


def _shaped(value: Tensor, slot: Slot, name: str) -> Tensor:
    if tuple(value.shape) != slot.shape:
        raise ValueError(
            f"state {name!r} of {slot.name!r} has shape {tuple(value.shape)}, expected {slot.shape}"
        )
    return value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and bool(torch.equal(one.cpu(), other.cpu()))
        )
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
