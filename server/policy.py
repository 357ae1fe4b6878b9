"""When a push is applied. A synchronous state machine whose answer is a ticket.

A ticket holds every decision about one step: its version, what multiplies the gradient and the lr, and the groups'
hyperparameters. The stepper executes tickets and decides nothing.
"""

from __future__ import annotations

from typing import Final

from pushstep.proto.types_pb2 import GroupValues, Staged, Ticket


class AsyncPolicy:
    """Every push is applied at once, on whatever version the model has by then. Staleness is measured."""

    name: Final = "async"

    def staleness(self, staged: Staged, version: int) -> int:
        """Versions applied since the one that the gradient was computed on."""
        return max(0, version - staged.base_version)

    def ticket(self, staged: Staged, version: int, factor: float, groups: list[GroupValues]) -> Ticket:
        """The ticket that makes `version` + 1 of a staged push."""
        return Ticket(
            identity=staged.identity, version=version + 1, factor=factor, lr_scale=1.0, groups=groups
        )

    def dump(self) -> dict[str, str]:
        """The policy as JSON."""
        return {"policy": self.name}
