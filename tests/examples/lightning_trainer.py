"""Lightning's module and trainer of these tests, imported when the first of them runs.

Importing Lightning takes 3 s, which each process that only collects the tests would pay, too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import StepLR

from tests.support.trainings.network import Network

Make = Callable[[torch.nn.Module], torch.optim.Optimizer]


class Regression(lightning.LightningModule):
    """What it makes its optimizer with is all that differs between remote and local."""

    def __init__(self, make: Make, *, scheduled: bool = True) -> None:
        super().__init__()
        self.network = Network()
        self.make = make
        self.scheduled = scheduled
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        ids, numbers = batch
        loss: torch.Tensor = self.network(ids, numbers).square().mean()
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.network)
        if not self.scheduled:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, step_size=1, gamma=0.7)}


def trainer(folder: Path, epochs: int, **options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=0.5,
        **options,
    )


def keep(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
