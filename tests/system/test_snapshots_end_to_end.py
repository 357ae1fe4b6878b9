"""A snapshot taken during training brings that training back: the same gradients make the same bits again.

After a live restore, after an orderly stop and a start, and after a kill.
"""

from __future__ import annotations

import asyncio
import signal
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pushstep.client import Outcome, RemoteOptimizer, Session, connect
from pushstep.proto.errors import Starting, Superseded, UnknownModel
from pushstep.server.config import Config
from pushstep.server.models.catalog import Catalog
from pushstep.server.models.saved_models import SavedModels
from tests.support.servers.harness import RunningServer, running_server
from tests.support.servers.judged import LAYOUT
from tests.support.servers.operators import add_hook, patch_group, restore, show_model, take_snapshot
from tests.support.trainings.bits import Bits, array_bits, hyperparameters, parameter_bits, state_bits
from tests.support.trainings.gradients import drawn_gradients, set_gradients
from tests.support.trainings.network import ScaledNetwork
from tests.support.trainings.optimizers import both

BEFORE = 20
AGAIN = range(BEFORE, BEFORE + 50)
CHANGED_AT = BEFORE + 10


@dataclass(frozen=True)
class Moment:
    """The model after one step: what must come out the same."""

    version: int
    parameters: Bits
    state: Any
    groups: Any
    clip_factor: float
    effective_lr: list[float]


class Training:
    """A worker whose gradients are the same for the same step number, at a model with hooks installed."""

    def __init__(self, server: RunningServer, session: Session) -> None:
        self.module = ScaledNetwork(sparse=True)
        self.session = session
        self.optimizer: RemoteOptimizer = session.attach(both(self.module), module=self.module)
        add_hook(server, session.model, "clip_grad_norm", "step_pre", {"max_norm": 0.8})
        # its period is longer than what comes before the snapshot: where it stands must come back too
        schedule = {"scheduler": "StepLR", "arguments": {"step_size": 7, "gamma": 0.9}, "groups": [1]}
        add_hook(server, session.model, "lr_scheduler", "step_post", schedule)

    def step(self, number: int) -> None:
        set_gradients(self.module, drawn_gradients(number, sparse=True))
        self.optimizer.step()

    def run(self, server: RunningServer, numbers: Iterable[int]) -> list[Moment]:
        """Steps, each with all that can be seen of the model after it; an operator edits on the way."""
        moments = []
        for number in numbers:
            if number == CHANGED_AT:
                patch_group(server, self.session.model, 0, lr=0.05)
            self.step(number)
            receipt = self.optimizer.last_receipt
            assert receipt is not None
            assert receipt.outcome is Outcome.APPLIED
            dicts = self.optimizer.state_dict()
            moments.append(
                Moment(
                    receipt.version,
                    parameter_bits(self.module),
                    [state_bits(entry) for entry in dicts],
                    [hyperparameters(entry) for entry in dicts],
                    receipt.clip_factor,
                    list(receipt.effective_lr),
                )
            )
        return moments

    def told_of_restore(self, number: int) -> None:
        """A step whose push is of a timeline that has ended: one warning, and on from what was restored."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.step(number)
        assert [warning.category for warning in caught] == [RuntimeWarning]
        assert any(words in str(caught[0].message) for words in ("restored to version", "has undone"))
        receipt = self.optimizer.last_receipt
        assert receipt is not None
        assert (receipt.outcome, receipt.reason) == (Outcome.SUPERSEDED, "superseded")


def check_worth_repeating(moments: list[Moment]) -> None:
    """The steps to be repeated moved everything there is to move."""
    assert [moment.version for moment in moments] == [number + 1 for number in AGAIN]
    assert len({tuple(moment.parameters.values()) for moment in moments}) == len(moments)
    assert len({moment.clip_factor for moment in moments}) > 10
    assert {moment.effective_lr[0] < 0.06 for moment in moments} == {True, False}
    assert len({moment.effective_lr[1] for moment in moments}) > 5


def test_a_live_restore_repeats_the_steps(server: RunningServer, model_name: str) -> None:
    with server.connect(model_name) as session, server.connect(model_name, "w1") as another:
        training = Training(server, session)
        idle_module = ScaledNetwork(sparse=True)
        idle = another.attach(both(idle_module), module=idle_module)
        training.run(server, range(BEFORE))
        snapshot = take_snapshot(server, model_name)
        assert (snapshot["version"], snapshot["timeline"]) == (BEFORE, 1)
        held = parameter_bits(training.module)
        first = training.run(server, AGAIN)
        check_worth_repeating(first)

        reply = restore(server, model_name, snapshot["id"])
        assert (reply["timeline"], reply["effective_version"]) == (2, BEFORE)
        training.told_of_restore(999)
        assert parameter_bits(training.module) == held
        assert training.run(server, AGAIN) == first  # any further warning would be an error
        assert training.optimizer.last_receipt is not None
        assert training.optimizer.last_receipt.timeline == 2

        # each worker is told once, whenever it comes back
        set_gradients(idle_module, drawn_gradients(7, sparse=True))
        with pytest.warns(RuntimeWarning, match="restored to version") as caught:
            idle.step()
        assert len(caught) == 1
        assert idle.last_receipt is not None
        assert idle.last_receipt.outcome is Outcome.SUPERSEDED
        assert parameter_bits(idle_module) == first[-1].parameters
        idle.step()
        assert idle.last_receipt.outcome is Outcome.APPLIED
        assert idle.last_receipt.version == first[-1].version + 1

        # the same snapshot again, on a third timeline
        assert restore(server, model_name, snapshot["id"])["timeline"] == 3
        training.told_of_restore(999)
        assert training.run(server, AGAIN) == first


def lasting_session(server: RunningServer) -> Session:
    """A session that outlives its server: over the Unix socket, whose name the next server takes again."""
    return connect(f"unix:{server.unix}", model="m", worker="w0", timeout_s=20, retry_for_s=60)


@pytest.fixture
def socket(tmp_path: Path) -> tuple[str, str]:
    """The option for a Unix socket whose path is short enough wherever the test's folder is."""
    return "--unix", str(tmp_path / "s")


def test_stopping_and_starting_the_server_loses_nothing(data: Path, socket: tuple[str, str]) -> None:
    with running_server(data, *socket) as server:
        session = lasting_session(server)
        training = Training(server, session)
        training.run(server, range(BEFORE))
        snapshot = take_snapshot(server, "m")
        held = parameter_bits(training.module)
        first = training.run(server, AGAIN)
        check_worth_repeating(first)
        assert server.stop(signal.SIGTERM) == 0
    with running_server(data, *socket) as server, session:
        shown = show_model(server, "m")
        assert (shown["version"], shown["timeline"]) == (first[-1].version, 1)
        with server.connect("m", "reader") as reader:
            assert array_bits(reader.pull()) == first[-1].parameters
        # everything acknowledged is there, so the worker goes on as if nothing had been
        assert [state_bits(entry) for entry in training.optimizer.state_dict()] == first[-1].state
        (further,) = training.run(server, [1000])
        assert further.version == first[-1].version + 1

        assert restore(server, "m", snapshot["id"])["timeline"] == 2
        training.told_of_restore(999)
        assert parameter_bits(training.module) == held
        assert training.run(server, AGAIN) == first


def test_a_killed_server_goes_on_from_its_snapshot(data: Path, socket: tuple[str, str]) -> None:
    with running_server(data, *socket) as server:
        session = lasting_session(server)
        training = Training(server, session)
        training.run(server, range(BEFORE))
        take_snapshot(server, "m")
        held = parameter_bits(training.module)
        first = training.run(server, AGAIN)
        check_worth_repeating(first)
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    with ThreadPoolExecutor(1) as thread:
        # the worker is in the middle of a step while there is no server
        telling = thread.submit(training.told_of_restore, 999)
        with running_server(data, *socket) as server, session:
            telling.result(60)
            shown = show_model(server, "m")
            assert (shown["version"], shown["timeline"]) == (BEFORE, 2)
            assert parameter_bits(training.module) == held
            assert training.run(server, AGAIN) == first
            assert training.optimizer.last_receipt is not None
            assert training.optimizer.last_receipt.timeline == 2
            assert training.optimizer.last_receipt.epoch > 1


def test_a_state_copied_before_a_restore_does_not_undo_it(data: Path) -> None:
    """A loaded state_dict fills a copy of the model; a restore may come until it is put in the model's place."""

    async def scenario() -> None:
        catalog = Catalog(Config(data=data))
        model = catalog.new_model("m", LAYOUT)
        catalog.models["m"] = model
        snapshot = (await catalog.snapshot("m", "test"))["id"]
        _, copy = await model.copy()
        await catalog.restore("m", snapshot, "test")
        with pytest.raises(Superseded, match="on timeline 2 since a restore, the request came on 1"):
            await catalog.restores.replace(model, copy, None, "test")
        assert model.timeline == 2
        await model.close()

    asyncio.run(scenario())


def test_no_model_is_missing_before_all_are_back(data: Path) -> None:
    """A worker that comes back while the server starts has to wait; "unknown" would end its training."""
    catalog = Catalog(Config(data=data))
    with pytest.raises(Starting):
        catalog.get("m")
    asyncio.run(SavedModels(catalog).load())
    with pytest.raises(UnknownModel):
        catalog.get("m")
