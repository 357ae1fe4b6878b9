"""Lightning's Trainer, with clipping, a scheduler and checkpoints of its own. `local` takes torch's own steps instead.

pushstep-server &
python lightning_fit.py [SERVER | local]
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pushstep.client import connect

server = sys.argv[1] if len(sys.argv) > 1 else "localhost:7070"
local = server == "local"


class Regression(lightning.LightningModule):
    """Nothing in it knows of a server but `configure_optimizers`."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer: torch.optim.Optimizer = torch.optim.Adagrad(self.network.parameters(), lr=0.1)
        if not local:
            optimizer = connect(server, model="lightning-fit", worker="w0").attach(
                optimizer, module=self.network
            )
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


lightning.seed_everything(0, verbose=False)
inputs = torch.randn(256, 8)
targets = torch.sin(inputs.sum(dim=1, keepdim=True))
module = Regression()
with tempfile.TemporaryDirectory() as folder:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=4,
        gradient_clip_val=0.5,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(inputs, targets), batch_size=32))
print("loss", nn.functional.mse_loss(module.network(inputs), targets).item())
