"""Lightning as it is: fit, save, rewind, a second fit(); strategy="ddp" is refused in words."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pushstep.optim import Adagrad
from tests.support.processes.nursery import nursery
from tests.support.servers.harness import RunningServer

pytestmark = [
    # Lightning's own, of this torch
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

Make = Callable[[torch.nn.Module], torch.optim.Optimizer]
BATCHES = 4


@pytest.fixture(scope="module")
def own() -> Any:
    """Lightning's side of these tests."""
    from tests.examples import lightning_trainer

    return lightning_trainer


def batches() -> DataLoader[Any]:
    made = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 9, (6 * BATCHES,), generator=made)
    return DataLoader(TensorDataset(ids, torch.randn(6 * BATCHES, 2, generator=made)), batch_size=6)


def fit(made: Any, module: Any, **options: Any) -> list[float]:
    """The losses of this fit()."""
    before = len(module.losses)
    made.fit(module, batches(), **options)
    return module.losses[before:]


def remote(server: RunningServer, model_name: str) -> Make:
    """As a script has it: a session of its own under the same name for each optimizer that is asked for."""
    return lambda network: server.connect(model_name).attach(
        torch.optim.Adagrad(network.parameters(), lr=0.1), module=network
    )


def local(network: torch.nn.Module) -> torch.optim.Optimizer:
    return Adagrad(network.parameters(), lr=0.1)


OPTIONS: dict[str, Any] = {"enable_checkpointing": False}


def test_its_losses_are_those_of_a_local_run(
    own: Any, server: RunningServer, model_name: str, tmp_path: Path
) -> None:
    module, one = own.Regression(remote(server, model_name)), own.Regression(local)
    assert fit(own.trainer(tmp_path, 3, **OPTIONS), module) == fit(own.trainer(tmp_path, 3, **OPTIONS), one)


# what it is told of the attach while the scheduler has gone on; the checkpoint that follows brings its own
@pytest.mark.filterwarnings("ignore:model .* has other values of lr:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:model .* it has gone back to the values:RuntimeWarning")
def test_save_and_rewind(own: Any, server: RunningServer, model_name: str, tmp_path: Path) -> None:
    """Lightning loads the module, asks for the optimizer and loads its state, in that order; the server is ahead."""
    told = []
    for make in (remote(server, model_name), local):
        folder = tmp_path / str(len(told))
        module, again = own.Regression(make), own.Regression(make)
        losses = fit(own.trainer(folder, 4, callbacks=[own.keep(folder)]), module)
        rewound = own.trainer(folder, 4, callbacks=[own.keep(folder)])
        after = fit(rewound, again, ckpt_path=folder / "epoch=1.ckpt", weights_only=False)
        assert after == losses[2 * BATCHES :]
        told.append((losses, [parameter.tolist() for parameter in again.parameters()]))
    assert told[0] == told[1]


def test_a_second_fit_goes_on(
    own: Any, server: RunningServer, model_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It asks for another optimizer: another session takes the name over at once, and says from where it continues.

    A local one begins with empty state; the server's goes on, as one longer fit() does.
    """
    module = own.Regression(remote(server, model_name), scheduled=False)
    one = own.Regression(local, scheduled=False)
    caplog.set_level("INFO", "pushstep.client")
    losses = fit(own.trainer(tmp_path, 2, **OPTIONS), module)
    losses += fit(own.trainer(tmp_path, 2, **OPTIONS), module)
    (said,) = [
        record.getMessage()
        for record in caplog.records
        if (record.name, record.levelname) == ("pushstep.client", "WARNING")
    ]
    assert said == f"worker 'w0' continues model '{model_name}' from version {2 * BATCHES}", "and no wait"
    assert losses == fit(own.trainer(tmp_path, 4, **OPTIONS), one)


DDP = """
import os, sys
address, model_name, meeting, rank, folder = sys.argv[1:]
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
os.environ |= {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": meeting}
import torch
import lightning.pytorch as lightning
from pushstep.client import connect
from pushstep.optim import Adagrad
from pushstep.proto.errors import UnsupportedModule
from torch.utils.data import DataLoader, TensorDataset
class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch, index):
        return self.layer(batch[0]).square().mean()
    def configure_optimizers(self):
        session = connect(address, model=model_name, worker=f"rank{rank}")
        return session.attach(Adagrad(self.layer.parameters()), module=self.layer)
data = DataLoader(TensorDataset(torch.ones(8, 2)))
try:
    lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, default_root_dir=folder).fit(Module(), data)
except UnsupportedModule as error:
    print("refused:", error)
"""


def test_ddp_is_refused_in_words(server: RunningServer, model_name: str, tmp_path: Path) -> None:
    """Two ranks, as torchrun starts them: each would push the average, and the server step for each."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = str(free.getsockname()[1])
    with nursery(tmp_path, "lightning.pytorch") as scripts:
        ranks = [
            scripts.start(DDP, server.grpc, model_name, meeting, str(rank), str(tmp_path))
            for rank in range(2)
        ]
        for rank in ranks:
            rank.wait()
            assert "refused:" in rank.said(), rank.said()
            assert "in Lightning strategy='ddp'" in rank.said()
            assert "policy='sync', workers=2" in rank.said()
    assert server.rest("GET", f"/v1/models/{model_name}").status_code == 404, "and nothing was made"
