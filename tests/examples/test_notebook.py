"""A notebook: a kernel of Jupyter's whose cells run again, and are interrupted."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from queue import Empty
from typing import Any

import pytest
from jupyter_client.manager import KernelManager

from tests.support.servers.harness import RunningServer

SETUP = """
import torch
from pushstep.client import connect
from pushstep.optim import Adagrad
torch.set_num_threads(1)
get_ipython().run_line_magic("xmode", "Minimal")  # or each traceback takes longer than the steps
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
def step(model, optimizer, number):
    made = torch.Generator().manual_seed(number)
    optimizer.zero_grad()
    loss = model(torch.randn(4, 6, generator=made)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()
"""
ATTACH = """
model = network()
session = connect({address!r}, model={model_name!r}, worker="notebook")
optimizer = session.attach(torch.optim.Adagrad(model.parameters(), lr=0.1), module=model)
began = session.member().version
def at():
    return optimizer.last_receipt.version if optimizer.last_receipt else began
"""
# Which batch is next is known by the version: an interrupt may come before a step or after it.
TRAIN = """
print("trains", flush=True)
while True:
    step(model, optimizer, at())
"""
COMPARE = """
versions = at()
local_model = network()
local = Adagrad(local_model.parameters(), lr=0.1)
for number in range(versions):
    expected = step(local_model, local, number)
same = all(torch.equal(a, b) for a, b in zip(model.parameters(), local_model.parameters()))
print(same, step(model, optimizer, versions) == step(local_model, local, versions), versions > 100)
"""


class Notebook:
    """Cells run in a kernel, as a person at a notebook does."""

    def __init__(self) -> None:
        self.manager = KernelManager()
        self.manager.start_kernel()
        self.client: Any = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        self.manager.cleanup_resources()

    def begin(self, code: str) -> str:
        """Run a cell that writes something, and come back once it has: its own code is at work then.

        An interrupt that comes earlier, while the kernel makes ready, ends the cell without an error's name.
        """
        cell: str = self.client.execute(code)
        while self._next(cell)["msg_type"] != "stream":
            pass
        return cell

    def end(self, cell: str) -> str:
        """What a cell that was begun has written, or the name of the error that it ended with."""
        said = ""
        while True:
            message = self._next(cell)
            content = message["content"]
            if message["msg_type"] == "stream":
                said += content["text"]
            elif message["msg_type"] == "error":
                said = content["ename"]
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                return said

    def run(self, code: str) -> str:
        return self.end(self.client.execute(code))

    def _next(self, cell: str) -> Any:
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=30)
            except Empty:
                raise AssertionError("the kernel says nothing any more") from None
            if message["parent_header"].get("msg_id") == cell:
                return message


@pytest.fixture
def notebook() -> Iterator[Notebook]:
    made = Notebook()
    yield made
    made.close()


def test_a_cell_that_is_interrupted_a_hundred_times(
    server: RunningServer, model_name: str, notebook: Notebook
) -> None:
    """Each time training goes on where it was; the cell that attaches is run again now and then, too."""
    attach = ATTACH.format(address=server.grpc, model_name=model_name)
    notebook.run(SETUP)
    assert notebook.run(attach) == ""
    chance = random.Random(0)
    for number in range(100):
        cell = notebook.begin(TRAIN)
        time.sleep(chance.uniform(0, 0.02))  # a moment like any other, and no wait for anything
        notebook.manager.interrupt_kernel()
        assert notebook.end(cell) == "KeyboardInterrupt"
        if number % 25 == 24:
            said = notebook.run(attach)
            assert "continues model" in said and "waits" not in said
    assert notebook.run(COMPARE).split() == ["True", "True", "True"]
