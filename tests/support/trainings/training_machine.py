"""What users do between steps, in any order: done to an attached optimizer and to local torch, which must stay equal.

A call that is refused is refused by a name, and the remedy that it names works; nothing is ever different in silence.
Interrupts have their own test: they would go into `step`.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import hypothesis.strategies as st
import torch
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor, nn
from torch.optim import lr_scheduler

from pushstep.proto.errors import (
    InvalidHyperparameter,
    LocalParameterEdit,
    OtherWorkersLive,
    UnsupportedModule,
    WrongDtype,
    WrongShape,
)
from tests.support.servers.harness import RunningServer
from tests.support.trainings.expected_model import ExpectedModel
from tests.support.trainings.expected_worker import ExpectedWorker
from tests.support.trainings.groups import copy_group
from tests.support.trainings.optimizers import adadelta, adagrad, both
from tests.support.trainings.trainee import STEPPED, Trainee, extras_of, values_of, write

MAKES = {"adadelta": adadelta, "adagrad": adagrad, "both": both}
names, seeds = st.sampled_from(STEPPED), st.integers(0, 20)
whos = st.sampled_from((0, 1))
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "steps": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
}
HYPERPARAMETERS = {
    "lr": 0.03,
    "eps": 1e-3,
    "maximize": True,
    "rho": 0.5,
    "lr_decay": 0.1,
    "weight_decay": 0.1,
}


def _data(tensor: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
    tensor.data.copy_(change(tensor.data))


def _counted(tensor: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad():
        tensor.copy_(change(tensor))


def _address(tensor: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
    tensor.data = change(tensor.data).clone()


def _array(tensor: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
    tensor.detach().numpy()[...] = change(tensor.data).numpy()


WAYS = {"data": _data, "counted": _counted, "address": _address, "array": _array}
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda t: t.clamp(-0.3, 0.3),
    "one element": lambda t: torch.where(torch.arange(t.numel()).view(t.shape) == 0, 0.75, t),
    "norm": lambda t: t / (1 + t.norm()),
    "nothing": lambda t: t.clone(),
}

# What is said of a state that is loaded: the values of before attach hold again, or those that the server has beside it.
STAYS = "and its own values, which are not those of this worker before attach"
LOADED = ("has gone back to the values that this worker had before", STAYS)


class Training(RuleBasedStateMachine):
    """One model, one or two workers, and local torch beside them."""

    server: ClassVar[RunningServer]
    count: ClassVar[int] = 0

    # Beginning.

    @initialize(
        make=st.sampled_from(sorted(MAKES)),
        sparse=st.booleans(),
        shared_memory=st.booleans(),
        edits=st.sampled_from(("sample", "check", "upload")),
        overlap=st.booleans(),
    )
    def begin(self, make: str, sparse: bool, shared_memory: bool, edits: str, overlap: bool) -> None:
        type(self).count += 1
        self.name = f"training-{type(self).count}"
        self.sparse = sparse
        self.workers: list[ExpectedWorker | None] = [None, None]
        self.expected = ExpectedModel(MAKES[make], Trainee(sparse=sparse))
        self.schedulers: list[Any] = []
        self.scalers: list[torch.amp.GradScaler] = []
        self.checkpoint: tuple[dict[str, Any], Any, Any] | None = None
        self._attach(0, Trainee(sparse=sparse), shared_memory, edits, overlap)

    def _attach(self, who: int, module: Trainee, shared_memory: bool, edits: str, overlap: bool) -> None:
        view = Trainee(sparse=self.sparse)
        write(view, values_of(self.expected.model) | self.expected.extras)
        made: Any = self.expected.make(module.trained())
        before = values_of(module) | extras_of(module)
        session = self.server.connect(self.name, f"w{who}", shared_memory=shared_memory)
        with self._said("has other values of"):
            remote = session.attach(made, module=module, edits=edits, overlap=overlap)  # type: ignore[arg-type]
        worker = self.workers[who] = ExpectedWorker(session, module, remote, edits, view, self.expected.make)
        for mine, theirs in zip(worker.groups, self.expected.groups, strict=True):
            copy_group(theirs, mine)
        worker.before = before if remote.values_from == "server" else {}
        worker.check()

    @contextlib.contextmanager
    def _said(self, *allowed: str) -> Iterator[list[str]]:
        """What was said: of our own warnings none but these; torch's about the order of calls are torch's affair."""
        words: list[str] = []
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield words
        words += [str(w.message) for w in said if w.category is not UserWarning]
        assert all(any(known in word for known in allowed) for word in words), words

    def _worker(self, who: int) -> ExpectedWorker:
        worker = self.workers[who]
        assert worker is not None
        return worker

    @property
    def alone(self) -> bool:
        return self.workers[1] is None

    # Steps.

    @rule(who=whos, seed=seeds, times=st.sampled_from((1, 1, 1, 2)), without=st.sets(names, max_size=2))
    def step(self, who: int, seed: int, times: int, without: set[str]) -> None:
        """A step, of accumulated gradients, or of some parameters only."""
        worker = self.workers[who]
        if worker is None:
            return
        for model in worker.both():
            model.zero_grad()
        worker.remote.zero_grad()
        for number in range(times):
            if any(worker.view.get_parameter(name).requires_grad for name in STEPPED):
                worker.backward(seed + number, lambda loss: loss, lambda loss: loss)
        for model in worker.both():
            for name in without:
                model.get_parameter(name).grad = None
        self._step(who, worker.remote.step, lambda optimizer: optimizer.step())

    @rule(who=whos, seed=seeds, inf=st.booleans(), unscale=st.booleans())
    def scaled(self, who: int, seed: int, inf: bool, unscale: bool) -> None:
        """A GradScaler's step, which may have found inf."""
        worker = self.workers[who]
        if worker is None or not all(worker.view.get_parameter(name).requires_grad for name in STEPPED):
            return
        scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
        for model in worker.both():
            model.zero_grad()
        worker.remote.zero_grad()
        worker.backward(seed, scalers[0].scale, scalers[1].scale)
        if inf:
            for model in worker.both():
                for name in ("table.weight", "out.weight"):  # of each optimizer: a push is all or nothing
                    gradient = model.get_parameter(name).grad
                    assert gradient is not None
                    (gradient._values() if gradient.is_sparse else gradient).view(-1)[0] = math.inf

        def local(optimizer: torch.optim.Optimizer) -> None:
            if unscale:
                scalers[1].unscale_(optimizer)
            scalers[1].step(optimizer)

        if unscale:
            scalers[0].unscale_(worker.remote)
        self._step(who, lambda: scalers[0].step(worker.remote), local)

    def _step(
        self, who: int, remote: Callable[[], Any], local: Callable[[torch.optim.Optimizer], Any]
    ) -> None:
        worker = self._worker(who)
        edited = worker.edited
        gradients = any(worker.view.get_parameter(name).grad is not None for name in STEPPED)
        with self._said("hyperparameter edits of this worker were ignored"):
            try:
                remote()
            except LocalParameterEdit as error:
                assert edited and worker.edits != "upload", "refused for nothing"
                assert error.fields["parameter"] in edited
                worker.session.upload()
                edited = list(STEPPED)
                remote()
        self.expected.take_edits(worker, edited)
        if gradients:
            skipped = (
                worker.remote.last_receipt is not None and worker.remote.last_receipt.outcome == "skipped"
            )
            if who == 0 and not skipped:
                self.expected.take_groups(worker)
            self.expected.push(worker, local)
            for mine, theirs in zip(worker.groups if who else (), self.expected.groups, strict=False):
                copy_group(theirs, mine)
        worker.check()

    # What is changed in between.

    @rule(who=whos, name=names, way=st.sampled_from(sorted(WAYS)), change=st.sampled_from(sorted(CHANGES)))
    def edit(self, who: int, name: str, way: str, change: str) -> None:
        """A parameter is written to, in whatever way."""
        worker = self.workers[who]
        if worker is not None:
            for model in worker.both():
                WAYS[way](model.get_parameter(name), CHANGES[change])
            if way in ("counted", "address"):
                worker.written.add(name)

    @rule(key=st.sampled_from(sorted(HYPERPARAMETERS)), group=st.sampled_from((0, 1)), tensor=st.booleans())
    def edit_group(self, key: str, group: int, tensor: bool) -> None:
        """The lead changes a hyperparameter."""
        worker, groups = self._worker(0), self._worker(0).groups
        if group >= len(groups) or key not in groups[group] or (key == "weight_decay" and self.sparse):
            return
        for of_group in (worker.remote.param_groups[group], groups[group]):
            value: Any = HYPERPARAMETERS[key]
            of_group[key] = torch.tensor(value) if tensor and key == "lr" else value

    @rule(who=whos, name=names, trained=st.booleans())
    def freeze(self, who: int, name: str, trained: bool) -> None:
        """A parameter is frozen, or not any more."""
        worker = self.workers[who]
        if worker is not None:
            for model in worker.both():
                model.get_parameter(name).requires_grad_(trained)

    @rule(name=names, same=st.booleans())
    def replace(self, name: str, same: bool) -> None:
        """The lead puts another tensor in a parameter's place, in the module and the groups."""
        worker = self._worker(0)
        for model in worker.both():
            part, _, leaf = name.rpartition(".")
            old = model.get_parameter(name)
            new = nn.Parameter(old.detach().clone() if same else old.detach() + 0.5, old.requires_grad)
            setattr(model.get_submodule(part), leaf, new)
            for group in worker.remote.param_groups if model is worker.module else ():
                group["params"] = [new if p is old else p for p in group["params"]]
        worker.fresh.add(name)

    @rule(who=whos, what=st.sampled_from(("norm.running_mean", "fixed.weight", "fixed.bias")))
    def write_extra(self, who: int, what: str) -> None:
        """A buffer or a frozen value is written to."""
        worker = self.workers[who]
        if worker is not None:
            for model in worker.both():
                model.state_dict()[what].mul_(0.5).add_(0.25)
            worker.written.add(what)

    # Schedulers.

    @rule(kind=st.sampled_from(sorted(SCHEDULERS)))
    def schedule(self, kind: str) -> None:
        optimizers = [self._worker(0).remote, *self._worker(0).shadows]
        self.schedulers = [SCHEDULERS[kind](optimizer) for optimizer in optimizers]

    @precondition(lambda self: self.schedulers)
    @rule()
    def scheduled(self) -> None:
        with self._said():
            for scheduler in self.schedulers:
                scheduler.step()

    # Checkpoints.

    @rule()
    def save(self) -> None:
        """The module and its optimizer; the optimizer's is what local torch has."""
        worker = self._worker(0)
        if worker.edited:
            return  # what has not been sent is in no state
        if worker.fresh:
            self.expected.take_edits(worker, [])
        state = worker.remote.state_dict()
        self.expected.check_state(state, worker)
        self.checkpoint = (
            copy.deepcopy(worker.module.state_dict()),
            copy.deepcopy(state),
            self.expected.saved(worker),
        )

    @precondition(lambda self: self.checkpoint)
    @rule(who=whos)
    def load_module(self, who: int) -> None:
        worker = self.workers[who]
        assert self.checkpoint is not None
        if worker is not None:
            for model in worker.both():
                model.load_state_dict(copy.deepcopy(self.checkpoint[0]))
            worker.written |= self.checkpoint[0].keys()

    @precondition(lambda self: self.checkpoint)
    @rule()
    def load_optimizer(self) -> None:
        """What was written to parameters before goes with it; while another worker lives nothing is replaced."""
        worker = self._worker(0)
        assert self.checkpoint is not None
        _, state, local = self.checkpoint
        timeline = worker.session.member().timeline
        try:
            with self._said(*LOADED):
                worker.remote.load_state_dict(copy.deepcopy(state))
        except OtherWorkersLive:
            assert not self.alone
            return
        self.schedulers = []
        self._load_groups(worker, local)
        if worker.session.member().timeline != timeline:  # or what was written is still to be sent
            worker.go_back()
            self.expected.take_edits(worker, list(STEPPED) if worker.before else worker.edited)
            self.expected.load(local)
            worker.came_with(values_of(self.expected.model))
        else:
            worker.settle_extras()
        self.expected.settle_extras(worker)
        worker.check()

    def _load_groups(self, worker: ExpectedWorker, saved: list[dict[str, Any]]) -> None:
        for shadow, of_one in zip(worker.shadows, copy.deepcopy(saved), strict=True):
            shadow.load_state_dict(of_one)

    # Coming and going.

    @precondition(lambda self: self.alone)
    @rule(
        seed=seeds,
        shared_memory=st.booleans(),
        edits=st.sampled_from(("sample", "check", "upload")),
        overlap=st.booleans(),
        rewinds=st.booleans(),
    )
    def attach_again(self, seed: int, shared_memory: bool, edits: str, overlap: bool, rewinds: bool) -> None:
        """The script is started again, from other values: it goes on, or back to the checkpoint."""
        worker = self._worker(0)
        edited = worker.edited
        with self._said("was changed here after the last step"):
            worker.session.close()
        if worker.edits == "upload":
            self.expected.take_edits(worker, edited)
        elif not edited:
            self.expected.take_edits(worker, [])  # of the same values, and of fresh state
        self.expected.extras = extras_of(worker.view)
        self.expected.take_groups(worker)
        self.schedulers = []
        module = Trainee(seed=seed + 1, sparse=self.sparse)
        if not rewinds or self.checkpoint is None:
            self._attach(0, module, shared_memory, edits, overlap)
            return
        saved, state, local = self.checkpoint
        module.load_state_dict(copy.deepcopy(saved))
        self._attach(0, module, shared_memory, edits, overlap)
        worker = self._worker(0)
        timeline = worker.session.member().timeline
        with self._said(*LOADED) as said:
            worker.remote.load_state_dict(copy.deepcopy(state))
        if any(STAYS in words for words in said):
            self._load_groups(worker, local)
            worker.check()
            return
        write(self.expected.model, {name: saved[name] for name in STEPPED})
        if worker.session.member().timeline != timeline:  # or its hyperparameters are still to be sent
            self.expected.load(local)
        self._load_groups(worker, local)
        write(worker.view, saved)
        worker.came_with(values_of(self.expected.model))
        self.expected.extras = extras_of(worker.view)
        worker.check()

    @precondition(lambda self: self.alone)
    @rule(shared_memory=st.booleans(), edits=st.sampled_from(("sample", "upload")), overlap=st.booleans())
    def second_joins(self, shared_memory: bool, edits: str, overlap: bool) -> None:
        """It has the model's values, whatever its own were, and the lead's frozen values and buffers."""
        self._attach(1, Trainee(seed=9, sparse=self.sparse), shared_memory, edits, overlap)

    @precondition(lambda self: not self.alone)
    @rule()
    def second_leaves(self) -> None:
        worker = self._worker(1)
        edited = worker.edited
        with self._said("was changed here after the last step"):
            worker.session.close()
        if worker.edits == "upload":
            self.expected.take_edits(worker, edited)
        self.workers[1] = None

    # What is refused.

    @rule(name=names, what=st.sampled_from(("dtype", "order", "one more", "lr")))
    def spoil(self, name: str, what: str) -> None:
        """Something that cannot be stepped: named, and put back it is as if it had not been."""
        worker = self._worker(0)
        parameter, group = worker.module.get_parameter(name), worker.remote.param_groups[-1]
        data, tensors, lr = parameter.data, list(group["params"]), group["lr"]
        trained = [p for p in worker.module.parameters() if p.requires_grad]
        if len(tensors) < 2 or not trained or (what == "lr" and (worker.edited or worker.fresh)):
            return
        expected: tuple[type[Exception], ...] = (UnsupportedModule,)
        if what == "dtype":
            parameter.data, expected = parameter.data.double(), (WrongDtype,)
        elif what == "order":  # of another shape: one that has replaced another is no known one yet
            group["params"], expected = tensors[::-1], (UnsupportedModule, WrongShape)
        elif what == "one more":
            group["params"] = [*tensors, nn.Parameter(torch.zeros(1))]
        else:
            group["lr"], expected = -1.0, (InvalidHyperparameter,)
        for one in trained:
            one.grad = torch.ones_like(one) if one.dtype == torch.float32 else None
        try:
            worker.remote.step()
        except expected:
            pass
        else:
            raise AssertionError(f"none of {expected}")
        finally:
            parameter.data = data if what == "dtype" else parameter.data
            group["params"], group["lr"] = tensors, lr
            worker.remote.zero_grad()

    def teardown(self) -> None:
        """In the end the model is what local torch has, and it is served. The next one has its place."""
        workers = [worker for worker in getattr(self, "workers", ()) if worker is not None]
        try:
            if sys.exc_info()[1] is None and workers:  # or something was wrong before
                self._end()
        finally:
            for worker in workers:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    worker.session.close()
            self.server.rest("DELETE", f"/v1/models/{self.name}")

    def _end(self) -> None:
        for who, worker in enumerate(self.workers):
            if worker is not None:
                for model in worker.both():
                    for name in STEPPED:
                        model.get_parameter(name).requires_grad_(True)
                self.step(who, 1, 1, set())
        lead = self._worker(0)
        self.expected.check_state(lead.remote.state_dict(), lead)
        held = lead.session.pull()
        for name, value in values_of(self.expected.model).items():
            assert torch.equal(torch.from_numpy(held[name]), value), name
