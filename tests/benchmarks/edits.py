"""What finding local edits costs beside the step that it precedes.

A worker over shared memory, where steps are shortest. Both looks of each step are timed where they happen (before the push, and
after the answer), the `step()` around them, and the whole iteration: for the multilayer perceptrons with forward and
backward pass of a batch of 32. Of each the median time, and the looks' shares of the medians.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pushstep.client import connect
from pushstep.client.attachment.local_edits import LocalEdits
from pushstep.optim import Adagrad
from tests.support.servers.harness import RunningServer, running_server

from .machine import Others
from .table import table

MODES = ("sample", "check", "upload")
ASKED = 0.01  # of an iteration, when sampling
WARM_UP = 3


def _dense(count: int, elements: int) -> tuple[list[nn.Parameter], Callable[[], list[Tensor]]]:
    gradients = [torch.full((elements,), 0.01) for _ in range(count)]
    return [nn.Parameter(torch.randn(elements)) for _ in range(count)], lambda: gradients


def _rows(rows: int, touched: int) -> tuple[list[nn.Parameter], Callable[[], list[Tensor]]]:
    def gradients() -> list[Tensor]:
        ids = torch.randint(0, rows, (1, touched))
        return [torch.sparse_coo_tensor(ids, torch.ones(touched, 32), (rows, 32))]

    return [nn.Parameter(torch.randn(rows, 32))], gradients


def _perceptron(*widths: int) -> tuple[list[nn.Parameter], Callable[[], list[Tensor]]]:
    layers = [layer for ends in pairwise(widths) for layer in (nn.Linear(*ends), nn.ReLU())]
    module = nn.Sequential(*layers[:-1])
    inputs, classes = torch.randn(32, widths[0]), torch.randint(0, widths[-1], (32,))
    parameters = list(module.parameters())

    def gradients() -> list[Tensor]:
        module.zero_grad()
        nn.functional.cross_entropy(module(inputs), classes).backward()
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    return parameters, gradients


CASES: dict[str, Callable[[], Any]] = {
    "perceptron, 10 K in 4": lambda: _perceptron(96, 96, 10),
    "perceptron, 17 K in 10": lambda: _perceptron(64, 64, 64, 64, 64, 10),
    "one of 10 K": lambda: _dense(1, 10_000),
    "12 of 2 K": lambda: _dense(12, 2_000),
    "1000 of 1 K": lambda: _dense(1000, 1_000),
    "4 of 4 M": lambda: _dense(4, 4 << 20),
    "1 K rows of 32 in 2 M": lambda: _rows(2 << 20, 1_000),
    "100 K rows of 32 in 2 M": lambda: _rows(2 << 20, 100_000),
}
QUICK = ("perceptron, 10 K in 4", "perceptron, 17 K in 10", "one of 10 K", "12 of 2 K")


class Watch:
    """Times the calls of a method, added up until they are asked for."""

    def __init__(self) -> None:
        self._s = 0.0

    def around(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """The same method, timed."""

        def timed(*arguments: Any) -> Any:
            begin_s = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                self._s += time.perf_counter() - begin_s

        return timed

    def take_s(self) -> float:
        """What they took since."""
        taken_s, self._s = self._s, 0.0
        return taken_s


class Mode:
    """One worker with an attached optimizer; its steps, and what its looks took of each."""

    def __init__(self, server: RunningServer, case: str, mode: Any) -> None:
        self.name = f"{case}, {mode}"
        self.iterations: list[float] = []
        self.whole: list[float] = []
        self.looks: list[float] = []
        self._parameters, self._gradients = CASES[case]()
        self._watch = Watch()
        self.session = connect(server.grpc, model=re.sub(r"\W", "-", self.name), worker="w0")
        self._remote = self.session.attach(Adagrad(self._parameters, lr=0.01), edits=mode)
        edits: LocalEdits = self._remote._parameters._edits
        edits.look = self._watch.around(edits.look)  # type: ignore[method-assign]
        edits.settle = self._watch.around(edits.settle)  # type: ignore[method-assign]

    def step(self) -> None:
        """One more."""
        first_s = time.perf_counter()
        for parameter, gradient in zip(self._parameters, self._gradients(), strict=True):
            parameter.grad = gradient
        begin_s = time.perf_counter()
        self._remote.step()
        end_s = time.perf_counter()
        self.iterations.append(end_s - first_s)
        self.whole.append(end_s - begin_s)
        self.looks.append(self._watch.take_s())

    def row(self, mode: str) -> tuple[str, ...]:
        """What the table says of it."""
        iteration_s, whole_s, looks_s = (
            statistics.median(times[WARM_UP:]) for times in (self.iterations, self.whole, self.looks)
        )
        share = looks_s / iteration_s
        return (
            self.name,
            f"{iteration_s * 1e3:.2f}",
            f"{whole_s * 1e3:.2f}",
            f"{looks_s * 1e6:.1f}",
            f"{looks_s / whole_s:.2%}",
            f"{share:.2%}",
            "" if mode != "sample" else "yes" if share < ASKED else "**no**",
        )


def main(quick: bool = False) -> None:
    """Print the table: the modes of a case take turns, step by step."""
    warnings.simplefilter("ignore")
    print(f"\n## edits: torch {torch.__version__}, {torch.get_num_threads()} threads")
    others, rows = Others(), []
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder), "--log-level", "error") as server,
    ):
        for case in QUICK if quick else CASES:
            steps = 10 if quick else 300 if case in QUICK else 60
            modes = {mode: Mode(server, case, mode) for mode in MODES}
            for _ in range(WARM_UP + steps):
                for mode in modes.values():
                    mode.step()
            for name, mode in modes.items():
                rows.append(mode.row(name))
                mode.session.close()
                server.rest("DELETE", f"/v1/models/{mode.session.model}")
    columns = (
        "parameters, edits=",
        "iteration ms",
        "step() ms",
        "looks us",
        "of step()",
        "of all",
        "below 1 %",
    )
    table("What looking for local edits costs", columns, rows, others.share())


if __name__ == "__main__":
    main()
