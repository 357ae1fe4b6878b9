"""Steps that fail: before anything is written the model goes on, half way through it is brought back; all are told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch

from pushstep.optim.rules.rule import Rule
from pushstep.proto.errors import (
    InvalidHyperparameter,
    ManifestChanged,
    ModelFailed,
    PushstepError,
    RejectedByHook,
    SnapshotUnsupported,
    SparseNotSupported,
    StepFailed,
)
from pushstep.proto.training_pb2 import GroupEdit, Process
from pushstep.proto.types_pb2 import Identity, Manifest, Outcome, Receipt
from pushstep.proto.wire.hyperparameters import wire_values
from pushstep.proto.wire.layout import Layout
from pushstep.server.config import Config
from pushstep.server.coordinator.groups import OperatorEdit
from pushstep.server.coordinator.policies import catalogue as policies
from pushstep.server.models.catalog import Catalog
from pushstep.server.models.creations import propose
from pushstep.server.models.edits import Edits
from pushstep.server.models.model import Model
from pushstep.server.models.saved_models import SavedModels
from pushstep.server.storage.saved_state import saved_state
from tests.support.servers.driven import Pusher, made
from tests.support.servers.judged import LAYOUT, UID

BOTH = {"a": torch.ones(2), "b": torch.ones(1)}
ROWS = {"a": (torch.tensor([1]), torch.ones(1, 1))}
DENSE = {"a": torch.ones(2)}


def bits(model: Model) -> bytes:
    """Every parameter, state and count."""
    arenas = model.arenas
    tensors = [*arenas.parameters, *(flat for states in arenas.states for flat in states.values())]
    return b"".join(tensor.numpy().tobytes() for tensor in tensors) + repr(arenas.steps).encode()


def kinds(model: Model) -> list[str]:
    return [event["kind"] for event in model.events]


async def refusal(push: Coroutine[Any, Any, Receipt] | asyncio.Task[Receipt]) -> PushstepError:
    with pytest.raises(PushstepError) as caught:
        await push
    return caught.value


def edit(**values: float) -> list[GroupEdit]:
    return [GroupEdit(group=0, values=wire_values(values))]


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bool], None]:
    """Has the n-th dense part that is planned from now on fail: at once, or when it is taken."""
    plan = Rule.plan_dense

    def install(number: int, taken: bool) -> None:
        seen = iter(range(1, 1000))

        def failing(*arguments: Any, **options: Any) -> Callable[[], None]:
            run = plan(*arguments, **options)
            if next(seen) != number:
                return run
            if not taken:
                raise MemoryError("no memory for a test")

            def broken() -> None:
                raise MemoryError("no memory for a test")

            return broken

        monkeypatch.setattr(Rule, "plan_dense", failing)

    return install


@pytest.mark.parametrize("part", [1, 2])
def test_what_fails_before_it_writes_moves_nothing(fault: Callable[[int, bool], None], part: int) -> None:
    """The push is refused by name, also when it is sent again; those behind it are applied."""

    async def scenario() -> None:
        model = made()
        worker = Pusher(model)
        await worker.push(BOTH)
        before = bits(model)
        fault(part, False)
        error = await refusal(worker.push(BOTH))
        assert isinstance(error, StepFailed)
        assert error.consumed
        assert bits(model) == before
        assert isinstance(await refusal(worker.resend(BOTH)), StepFailed)
        assert kinds(model)[-1] == "step_failed"
        receipt = await worker.push(BOTH)
        assert (receipt.outcome, receipt.version) == (Outcome.OUTCOME_APPLIED, 3)
        assert list(model.arenas.steps) == [2, 2]
        assert bits(model) != before
        await model.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("fails", [False, True], ids=["taken", "failed"])
@pytest.mark.parametrize("ends", [True, False], ids=["stop", "snapshot"])
def test_a_snapshot_says_of_a_queued_step_what_came_of_it(
    ends: bool, fails: bool, fault: Callable[[int, bool], None], data: Path
) -> None:
    """What is decided when the snapshot begins is in it as it was stepped, or refused: a retry is told no other."""

    async def scenario() -> None:
        catalog = Catalog(Config(data=data))
        model = catalog.new_model("m", LAYOUT)
        model.coordinator.uid = UID  # as the pusher has it
        creation = catalog.begin_creation("m", "w", propose(LAYOUT.manifest), 0.0, 0, Process())
        await catalog.finish_creation("m", creation, model)
        pusher, is_free = Pusher(model), threading.Event()
        await pusher.push(BOTH)
        busy = model.writer.submit(is_free.wait)
        if fails:
            fault(1, False)
        push = pusher.later(BOTH)
        while model.version < 2:
            await asyncio.sleep(0)
        saving: asyncio.Future[Any] = asyncio.ensure_future(
            SavedModels(catalog).save() if ends else catalog.snapshot("m", "operator")
        )
        for _ in range(10):
            await asyncio.sleep(0)
        is_free.set()
        await busy
        assert await saving
        told = (await asyncio.gather(push, return_exceptions=True))[0]
        if not ends:
            await model.close()
        again = Catalog(Config(data=data))
        await SavedModels(again).load()
        loaded = again.models["m"]
        decided = loaded.sessions.workers["w"].decided_pushes[-1]
        assert isinstance(decided.error, StepFailed) is isinstance(told, StepFailed) is fails
        assert decided.receipt.outcome == (Outcome.OUTCOME_REJECTED if fails else Outcome.OUTCOME_APPLIED)
        assert decided.receipt.version == loaded.version == 2
        assert bits(loaded) == bits(model)
        await loaded.close()

    asyncio.run(scenario())


def test_nothing_is_applied_behind_a_step_that_broke_off_half_way(
    fault: Callable[[int, bool], None],
) -> None:
    """Pushes that wait in the writer's queue are refused, and nobody reads what lies between two versions."""

    async def scenario() -> None:
        model = made()
        workers = [Pusher(model, name) for name in "xyz"]
        fault(2, True)
        pushes = [worker.later(BOTH) for worker in workers]
        errors = [await refusal(push) for push in pushes]
        assert [error.code for error in errors] == ["step_failed", "model_failed", "model_failed"]
        torn = bits(model)
        assert list(model.arenas.steps) == [0, 0]
        assert "failed" in kinds(model)
        for reading in (
            model.copy,
            lambda: model.publisher.newest(None, None, None),
            lambda: workers[0].push(BOTH),
        ):
            with pytest.raises(ModelFailed):
                await reading()
        model.failed = None  # the writer does not go by what the loop knows
        with pytest.raises(ModelFailed):
            await model.writer.submit(lambda: None)
        assert bits(model) == torn
        await model.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("snapshotted", [True, False])
def test_a_torn_model_is_brought_back_from_its_newest_snapshot(
    data: Path, fault: Callable[[int, bool], None], snapshotted: bool
) -> None:
    async def scenario() -> None:
        catalog = Catalog(Config(data=data))
        model = catalog.new_model("m", LAYOUT)
        catalog.models["m"] = model
        catalog.loaded = True
        model.uid = model.coordinator.uid = b"uid"
        worker = Pusher(model)
        await worker.push(BOTH)
        if snapshotted:
            await catalog.snapshot("m", "test")
        before = bits(model)
        fault(2, True)
        assert isinstance(await refusal(worker.push(BOTH)), StepFailed)
        assert bits(model) != before
        await asyncio.gather(*catalog._tasks)
        if snapshotted:
            assert bits(model) == before
            assert (model.timeline, model.version, model.failed) == (2, 1, None)
            assert kinds(model)[-2:] == ["failed", "restored"]
            again = Pusher(model, "another")
            assert (await again.push(BOTH)).version == 2
        else:
            assert isinstance(model.failed, ModelFailed)
        await model.close()

    asyncio.run(scenario())


def test_a_failed_load_is_told_and_can_be_done_again(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        catalog = Catalog(Config(data=data))
        model = catalog.models["m"] = catalog.new_model("m", LAYOUT)
        catalog.loaded = True
        snapshot = (await catalog.snapshot("m", "test"))["id"]
        load = model.arenas.load

        def failing(copy: Any, timeline: int, averaging: Any) -> None:
            copy.parameters.pop()
            load(copy, timeline, averaging)

        monkeypatch.setattr(model, "on_failed", lambda model: None)
        monkeypatch.setattr(model.arenas, "load", failing)
        with pytest.raises(ValueError, match="argument"):
            await catalog.restore("m", snapshot, "test")
        assert model.failed is not None
        monkeypatch.setattr(model.arenas, "load", load)
        await catalog.restore("m", snapshot, "test")
        assert (model.failed, model.timeline, model.arenas.torn) == (None, 3, False)
        await model.close()

    asyncio.run(scenario())


def test_a_restore_of_what_does_not_fit_is_refused_whole(data: Path) -> None:
    """A group was added, or a hook of the snapshot is not in this build: the model goes on as it was."""

    async def scenario() -> None:
        catalog = Catalog(Config(data=data))
        model = catalog.models["m"] = catalog.new_model("m", LAYOUT)
        catalog.loaded = True
        manifest, copy = catalog.snapshots("m").read((await catalog.snapshot("m", "test"))["id"])
        model.groups.list[0].values["lr"] = 0.5
        hooks = [{"id": "x-1", "name": "x", "point": "step_pre", "settings": {}, "state": {}}]
        before = model.dump()
        for wrong in ({"hooks": hooks}, {"policy": {"policy": "x"}}, {"gate": {}}, {"workers": [{}]}):
            with pytest.raises(SnapshotUnsupported):
                saved_state({**manifest, **wrong}, copy, "m")
        added = Manifest()
        added.CopyFrom(LAYOUT.manifest)
        added.parameters[0].aliases.append("c")
        model.layout = Layout(added)
        with pytest.raises(ManifestChanged):
            await catalog.restores.replace(model, copy, saved_state(manifest, copy, "m"), "test")
        model.layout = LAYOUT
        assert model.dump() == before
        await model.close()

    asyncio.run(scenario())


def test_a_write_is_done_although_nobody_waits_for_it_any_more() -> None:
    """A version was given to it: an upload whose sender goes away is written, or it was never there."""

    async def scenario() -> None:
        model = made()
        done: list[int] = []
        go_on = threading.Event()
        blocked = model.writer.submit(go_on.wait)
        writing = asyncio.ensure_future(model.writer.write(lambda: done.append(1)))
        await asyncio.sleep(0)
        writing.cancel()
        go_on.set()
        await blocked
        await model.writer.submit(lambda: None)
        assert done == [1]
        await model.close()

    asyncio.run(scenario())


@pytest.mark.parametrize("fails", [True, False], ids=["failed", "written"])
def test_what_comes_of_a_write_is_noted_although_its_caller_is_gone(fails: bool) -> None:
    """Its stored outcome is what happened, whoever asks for it again: else a failed upload stays applied for ever."""

    async def scenario() -> None:
        model = made()
        Pusher(model)
        go_on = threading.Event()

        def write() -> None:
            if fails:
                raise OSError("no memory for a test")

        identity = Identity(model_uid=UID, timeline=1, worker="w", epoch=1, sequence=1)
        decided, _ = model.coordinator.uploaded(identity, 7, model.clock())
        blocked = model.writer.submit(go_on.wait)
        writing = asyncio.ensure_future(model.executor.write(write, decided, None))
        await asyncio.sleep(0)
        writing.cancel()
        go_on.set()
        await blocked
        await asyncio.gather(*model.executor._tasks, return_exceptions=True)
        assert writing.cancelled()
        expected = Outcome.OUTCOME_REJECTED if fails else Outcome.OUTCOME_APPLIED
        assert decided.receipt.outcome == expected
        assert ("step_failed" in kinds(model)) == fails
        assert model.executor.under_way() == []
        await model.close()

    asyncio.run(scenario())


def test_a_hook_with_a_defect_refuses_the_push_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        model = made()
        worker = Pusher(model)
        hook = model.hooks.add("clip_grad_norm", "step_pre", {"max_norm": 1.0}, model.groups, model.name)
        monkeypatch.setattr(hook, "step_pre", lambda context: {}["key"])
        error = await refusal(worker.push(BOTH))
        assert isinstance(error, RejectedByHook)
        assert (hook.failures, model.version) == (1, 0)
        monkeypatch.setattr(model.commits, "_context", lambda order: {}["key"])
        assert isinstance(await refusal(worker.push(BOTH)), StepFailed)
        assert kinds(model)[-2:] == ["step_failed", "push_rejected"]
        await model.close()

    asyncio.run(scenario())


def test_edits_that_rows_cannot_be_stepped_with_are_refused_with_their_push() -> None:
    """A push is decided on with the values that it is stepped with: its own edits are among them."""

    async def scenario() -> None:
        model = made()
        worker = Pusher(model)
        assert (await worker.push(ROWS)).version == 1
        before = bits(model)
        error = await refusal(worker.push(ROWS, edits=edit(weight_decay=0.1)))
        assert isinstance(error, SparseNotSupported)
        assert (bits(model), model.groups.list[0].values["weight_decay"]) == (before, 0.0)
        assert (await worker.push(ROWS, edits=edit(weight_decay=0.0))).version == 2
        # an operator is told as well, as long as the gradients are row-sparse
        with pytest.raises(InvalidHyperparameter, match="'a'"):
            Edits(model).patch_group(0, OperatorEdit({"weight_decay": 0.1}, hold=False), "test")
        assert (await worker.push(DENSE)).version == 3
        Edits(model).patch_group(0, OperatorEdit({"weight_decay": 0.1}, hold=False), "test")
        assert isinstance(await refusal(worker.push(ROWS)), SparseNotSupported)
        assert (await worker.push(ROWS, edits=edit(weight_decay=0.0))).version == 4
        await model.close()

    asyncio.run(scenario())


def test_an_edit_that_a_rounds_other_rows_exclude_does_not_count() -> None:
    async def scenario() -> None:
        model = made()
        lead, other = Pusher(model, "lead"), Pusher(model, "other")
        Edits(model).set_policy(policies.read({"policy": "sync"}), "test")
        pushes = asyncio.gather(
            lead.push({"b": torch.ones(1)}, edits=edit(weight_decay=0.1, lr=0.5)), other.push(ROWS)
        )
        told, _ = await pushes
        assert told.outcome == Outcome.OUTCOME_APPLIED
        assert sorted(told.ignored_edits) == ["0.lr", "0.weight_decay"]
        assert model.groups.list[0].values["weight_decay"] == 0.0
        await model.close()

    asyncio.run(scenario())
