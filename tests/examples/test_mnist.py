"""The loop of PyTorch's MNIST example: a convolutional net with dropout, Adadelta, StepLR, a test after each epoch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from pushstep.optim import Adadelta
from tests.support.servers.harness import RunningServer

EPOCHS, IMAGES, CLASSES = 4, 160, 10


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3)
        self.conv2 = nn.Conv2d(8, 16, 3)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(16 * 12 * 12, 32)
        self.fc2 = nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        found = F.relu(self.conv2(F.relu(self.conv1(images))))
        found = self.dropout1(F.max_pool2d(found, 2)).flatten(1)
        return F.log_softmax(self.fc2(self.dropout2(F.relu(self.fc1(found)))), dim=1)


def digits(seed: int) -> DataLoader[Any]:
    """A pattern for each class, and noise: nothing is fetched."""
    made = torch.Generator().manual_seed(0)
    patterns = torch.randn(CLASSES, 1, 28, 28, generator=made)
    made.manual_seed(seed)
    labels = torch.randint(0, CLASSES, (IMAGES,), generator=made)
    images = patterns[labels] + torch.randn(IMAGES, 1, 28, 28, generator=made)
    return DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True)


def train(model: nn.Module, loader: DataLoader[Any], optimizer: optim.Optimizer) -> list[float]:
    model.train()
    losses = []
    for images, labels in loader:
        optimizer.zero_grad()
        loss = F.nll_loss(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def evaluate(model: nn.Module, loader: DataLoader[Any]) -> tuple[float, int]:
    model.eval()
    loss, correct = 0.0, 0
    with torch.no_grad():
        for images, labels in loader:
            output = model(images)
            loss += F.nll_loss(output, labels, reduction="sum").item()
            correct += int((output.argmax(dim=1) == labels).sum())
    return loss / IMAGES, correct


def run(server: RunningServer | None, model_name: str) -> tuple[list[Any], dict[str, Tensor]]:
    """The example's main(), with a server or without."""
    torch.manual_seed(1)
    model = Net()
    if server is None:
        optimizer: optim.Optimizer = Adadelta(model.parameters(), lr=1.0)
    else:
        optimizer = server.connect(model_name).attach(
            optim.Adadelta(model.parameters(), lr=1.0), module=model
        )
    scheduler = StepLR(optimizer, step_size=1, gamma=0.7)
    said: list[Any] = []
    for _ in range(EPOCHS):
        said += train(model, digits(1), optimizer)
        said.append(evaluate(model, digits(2)))
        scheduler.step()
    return said, model.state_dict()


def test_its_losses_are_those_of_a_local_run(server: RunningServer, model_name: str) -> None:
    (losses, weights), (local_losses, local_weights) = run(server, model_name), run(None, model_name)
    assert losses == local_losses
    assert all(torch.equal(tensor, local_weights[name]) for name, tensor in weights.items())
    assert losses[-1][1] > IMAGES / 2, "it learns"
