"""Hugging Face's Trainer as it is: an optimizer given, or made by a subclass; checkpoints, and resuming from one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from pushstep.optim import Adagrad
from tests.support.servers.harness import RunningServer

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


def adagrad(model: torch.nn.Module) -> Adagrad:
    return Adagrad(model.parameters(), lr=0.1)


# what it is told of the attach while the scheduler has gone on; the checkpoint that follows brings its own
@pytest.mark.filterwarnings("ignore:model .* has other values of lr:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:model .* it has gone back to the values:RuntimeWarning")
@pytest.mark.parametrize("kind", [given, made_by_a_subclass])
def test_it_resumes_while_the_server_is_ahead(
    server: RunningServer, model_name: str, tmp_path: Path, kind: Callable[..., Noting]
) -> None:
    def attached(model: torch.nn.Module) -> torch.optim.Optimizer:
        original = torch.optim.Adagrad(model.parameters(), lr=0.1)
        return server.connect(model_name).attach(original, module=model)

    told = []
    for name, make in (("remote", attached), ("local", adagrad)):
        options = {"args": arguments(tmp_path / name), "train_dataset": Sentences()}
        first = kind(make, tiny(), **options)
        first.train()
        again = kind(make, tiny(), **options)
        again.train(resume_from_checkpoint=str(tmp_path / name / f"checkpoint-{KEPT}"))
        assert again.losses == first.losses[KEPT:], name
        assert len(first.losses) == STEPS
        told.append((first.losses, [parameter.tolist() for parameter in again.model.parameters()]))
    assert told[0] == told[1]
