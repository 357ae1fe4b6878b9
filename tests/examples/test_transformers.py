"""Hugging Face's Trainer as it is: an optimizer given, or made by a subclass; checkpoints, and resuming from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pushstep.optim import Adagrad
from tests.support.servers.harness import RunningServer


@pytest.fixture(scope="module")
def own() -> Any:
    """The Trainer's side of these tests."""
    from tests.examples import transformers_trainer

    return transformers_trainer


def adagrad(model: torch.nn.Module) -> Adagrad:
    return Adagrad(model.parameters(), lr=0.1)


# what it is told of the attach while the scheduler has gone on; the checkpoint that follows brings its own
@pytest.mark.filterwarnings("ignore:model .* has other values of lr:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:model .* it has gone back to the values:RuntimeWarning")
@pytest.mark.parametrize("kind", ["given", "made_by_a_subclass"])
def test_it_resumes_while_the_server_is_ahead(
    own: Any, server: RunningServer, model_name: str, tmp_path: Path, kind: str
) -> None:
    def attached(model: torch.nn.Module) -> torch.optim.Optimizer:
        original = torch.optim.Adagrad(model.parameters(), lr=0.1)
        return server.connect(model_name).attach(original, module=model)

    told, made = [], getattr(own, kind)
    for name, make in (("remote", attached), ("local", adagrad)):
        options = {"args": own.arguments(tmp_path / name), "train_dataset": own.Sentences()}
        first = made(make, own.tiny(), **options)
        first.train()
        again = made(make, own.tiny(), **options)
        again.train(resume_from_checkpoint=str(tmp_path / name / f"checkpoint-{own.KEPT}"))
        assert again.losses == first.losses[own.KEPT :], name
        assert len(first.losses) == own.STEPS
        told.append((first.losses, [parameter.tolist() for parameter in again.model.parameters()]))
    assert told[0] == told[1]
