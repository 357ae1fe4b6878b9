"""What leaves the service as a checkpoint: plain torch goes on from it, bit for bit."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pushstep.client import Session
from tests.support.numbers.ulps import assert_parameter_close, assert_state_close
from tests.support.processes.forked import Origin
from tests.support.servers.harness import RunningServer
from tests.support.servers.operators import download, show_model
from tests.support.trainings.bits import bits, hyperparameters, parameter_bits, state_bits
from tests.support.trainings.gradients import drawn_gradients, set_gradients
from tests.support.trainings.network import ScaledNetwork
from tests.support.trainings.optimizers import OPTIMIZERS, both
from tests.system.test_end_to_end import attached

PLAIN_TORCH = Path(__file__).parents[1] / "support" / "processes" / "plain_torch.py"


pytestmark = pytest.mark.usefixtures("quiet_sparse_tensors")


EXPORTS = {
    "adadelta": ["adadelta"],
    "adagrad": ["adagrad"],
    "both": ["adagrad", "adadelta"],
}


@pytest.fixture(scope="module")
def plain_torch() -> Iterator[Origin]:
    """Processes that find torch imported, and nothing of pushstep."""
    origin = Origin("torch._dynamo")
    try:
        yield origin
    finally:
        origin.close()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", EXPORTS)
def test_plain_torch_continues_from_an_export(
    server: RunningServer, session: Session, plain_torch: Origin, tmp_path: Path, name: str, sparse: bool
) -> None:
    rules = EXPORTS[name]
    mine = ScaledNetwork(sparse=sparse)
    optimizers = (
        both(mine) if len(rules) == 2 else OPTIMIZERS[rules[0]](mine.parameters(), lr=0.3, maximize=True)
    )
    remote = session.attach(optimizers, module=mine)
    for number in range(15):
        set_gradients(mine, drawn_gradients(number, sparse=sparse))
        remote.step()
    exported = download(server, f"{session.model}/export", "torch")
    # torch's Adadelta takes no row-sparse gradients; its state came from them all the same
    gradients = drawn_gradients(16, sparse=sparse and "adagrad" in rules)
    (tmp_path / "export.pt").write_bytes(exported)
    torch.save(gradients, tmp_path / "gradients.pt")
    before = copy.deepcopy(mine)
    set_gradients(mine, gradients)
    remote.step()

    files = [str(tmp_path / file) for file in ("export.pt", "gradients.pt", "result.pt")]
    process = plain_torch.run(PLAIN_TORCH.read_text(), (*files, *rules), tmp_path / "log")
    assert process.wait(60) == 0, (tmp_path / "log").read_text()
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    assert {key: bits(value) for key, value in found["loaded"].items()} == parameter_bits(before)
    fetched = remote.state_dict() if len(rules) == 2 else [remote.state_dict()]
    for continued, held in zip(fetched, found["optimizers"], strict=True):
        assert continued["state"].keys() == held["state"].keys()
        assert len(held["state"]) > 0
        for number, state in held["state"].items():
            assert_state_close(continued["state"][number], state)
        assert hyperparameters(continued) == hyperparameters(held)
    for key, parameter in mine.named_parameters():
        assert_parameter_close(parameter, found["model"][key], before.get_parameter(key))


def test_an_export_is_one_version_and_says_which(server: RunningServer, session: Session) -> None:
    mine, remote = attached(session, "adadelta", {})
    for number in range(3):
        set_gradients(mine, drawn_gradients(number))
        remote.step()
    answer = server.rest("GET", f"/v1/models/{session.model}/export", params={"format": "torch"})
    assert answer.headers["X-Pushstep-Version"] == "3"
    assert answer.headers["X-Pushstep-Timeline"] == str(show_model(server, session.model)["timeline"])
    loaded = torch.load(io.BytesIO(answer.content), weights_only=True)
    assert {name: bits(value) for name, value in loaded["model"].items()} == parameter_bits(mine)
    assert state_bits(loaded["optimizer"]) == state_bits(remote.state_dict())
