"""Hugging Face's Trainer of these tests, imported when the first of them runs.

Importing it takes seconds, which each process that only collects the tests would pay, too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

Make = Callable[[torch.nn.Module], torch.optim.Optimizer]
STEPS, KEPT = 8, 4


class Sentences(Dataset[Any]):
    """Numbers for words, and which of two classes they are of."""

    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, index: int) -> dict[str, Any]:
        made = torch.Generator().manual_seed(index)
        return {"input_ids": torch.randint(0, 20, (6,), generator=made), "labels": torch.tensor(index % 2)}


def tiny() -> torch.nn.Module:
    """Made from a configuration, so that nothing is fetched."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=6,
        )
    )


class Noting(Trainer):
    """The Trainer, with the exact losses: its log rounds them."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.remove_callback(PrinterCallback)
        self.losses: list[float] = []

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **options)
        self.losses.append(loss.item())
        return loss


class Making(Noting):
    """A subclass with an optimizer of its own, as the documentation has it."""

    def __init__(self, make: Make, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._make = make

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        self.optimizer = self._make(self.model)
        return self.optimizer


def given(make: Make, model: Any, **options: Any) -> Noting:
    """The optimizer is there before the Trainer is; the scheduler is the Trainer's."""
    return Noting(model, optimizers=(make(model), None), **options)


def made_by_a_subclass(make: Make, model: Any, **options: Any) -> Noting:
    return Making(make, model, **options)


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=4,
        max_steps=STEPS,
        save_steps=KEPT,
        learning_rate=0.1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
