"""One worker of a training: what it has, and what it should have.

What its gradients are computed on is its `view`: the values that came with its last step, and its own buffers. What it
writes to its parameters is its own until it is sent. Both are done to the worker's module and to its view alike, so that
whatever the service then does can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pushstep.client import RemoteOptimizer, Session
from tests.support.trainings.groups import check_group
from tests.support.trainings.network import loss_of
from tests.support.trainings.optimizers import Make, made
from tests.support.trainings.trainee import STEPPED, Trainee, extras_of, values_of, write


class ExpectedWorker:
    """One worker: what it has, and what it should have."""

    def __init__(
        self,
        session: Session,
        module: Trainee,
        remote: RemoteOptimizer,
        edits: str,
        view: Trainee,
        make: Make,
    ) -> None:
        self.session = session
        # torch's optimizers over the view: whose groups its own should be
        self.shadows = made(make, view.trained())
        self.module = module
        self.remote = remote
        self.edits = edits
        self.view = view
        # what its parameters were when they came, and whose optimizer state is to begin anew
        self.came = values_of(view)
        self.fresh: set[str] = set()
        # what its module held before attach, until its first step
        self.before: dict[str, Tensor] = {}
        self.extras_came = extras_of(view)
        # what was written to since attach, if only with what it held
        self.written: set[str] = set()

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Its param groups, as they should be."""
        return [group for optimizer in self.shadows for group in optimizer.param_groups]

    @property
    def edited(self) -> list[str]:
        """The parameters that were written to since."""
        now = values_of(self.view)
        return [name for name in STEPPED if not torch.equal(now[name], self.came[name])]

    def both(self) -> Iterator[Trainee]:
        """Its module and the view, for what is done to either."""
        yield self.module
        yield self.view

    def backward(
        self, seed: int, scale: Callable[[Tensor], Tensor], scale_view: Callable[[Tensor], Tensor]
    ) -> None:
        """Add the gradients of a batch."""
        scale(loss_of(self.module, seed)).backward()
        scale_view(loss_of(self.view, seed)).backward()

    def came_with(self, values: dict[str, Tensor]) -> None:
        """A step has brought these."""
        write(self.view, values)
        self.came = values_of(self.view)
        self.fresh.clear()
        self.before = {}

    def go_back(self) -> None:
        """To what was before attach, but for what was written to since."""
        write(self.view, self._unwritten())

    def _unwritten(self) -> dict[str, Tensor]:
        now = extras_of(self.view)
        written = {name for name, value in self.extras_came.items() if not torch.equal(now[name], value)}
        kept = {*self.edited, *written, *self.written, *self.fresh}
        return {name: value for name, value in self.before.items() if name not in kept}

    def settle_extras(self) -> None:
        """The state that was loaded is the server's: buffers are as they were, or as before attach, all of them."""
        earlier = {name: value for name, value in self._unwritten().items() if name not in STEPPED}
        here = extras_of(self.module)
        if all(torch.equal(here[name], value) for name, value in earlier.items()):
            write(self.view, earlier)

    def check(self) -> None:
        """The module is what it should be, to the bit."""
        expected = self.view.state_dict()
        for name, value in self.module.state_dict().items():
            assert torch.equal(value, expected[name]), name
        for mine, theirs in zip(self.remote.param_groups, self.groups, strict=True):
            check_group(mine, theirs)
