"""Averages of parameters that hooks keep: for each hook, a flat buffer beside every arena of the groups that it averages.

They are float32 (float64 beside float64), also of half parameters. A ticket says when they move, so a replay moves them, too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from pushstep.optim.ops.copies import copy
from pushstep.optim.ops.transforms import plan_average
from pushstep.proto.types_pb2 import ParameterAverage, Ticket
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.layout import Layout, Slot

from ..captures.capture import Averaged, Span
from ..process.memory import take

# By hook, then by arena.
Buffers = Mapping[str, Mapping[int, Tensor]]
WHAT = "averages of the model's parameters"


class Averages:
    """The averages of one model's arenas. Only the model's writer thread touches them."""

    def __init__(self) -> None:
        self.buffers: dict[str, dict[int, Tensor]] = {}

    @staticmethod
    def bytes_needed(layout: Layout, wanted: Mapping[str, Sequence[int]]) -> int:
        """Bytes that the averages of hooks take. wanted: by hook, the groups that it averages."""
        of = [group for groups in wanted.values() for group in groups]
        arenas = [arena for group in of for arena in layout.arenas_of_group[group]]
        return sum([arena.elements * dtypes.state_dtype(arena.dtype).itemsize for arena in arenas])

    def begin(self, hook: str, groups: Sequence[int], layout: Layout, parameters: Sequence[Tensor]) -> None:
        """Have averages for a hook, equal to the parameters. OutOfMemory, and then there are none."""
        kept = self.buffers.get(hook)
        if kept is None:
            kept = {
                arena.index: take(
                    arena.elements,
                    dtypes.state_dtype(arena.dtype),
                    WHAT,
                    device=parameters[arena.index].device,
                )
                for group in groups
                for arena in layout.arenas_of_group[group]
            }
        for arena, average in kept.items():
            average.copy_(parameters[arena])
        self.buffers[hook] = kept

    def keep(self, wanted: Mapping[str, Sequence[int]], layout: Layout, parameters: Sequence[Tensor]) -> None:
        """Have the averages of these hooks, with their groups, and no others. New ones equal the parameters."""
        for hook in self.buffers.keys() - wanted.keys():
            del self.buffers[hook]
        for hook, groups in wanted.items():
            if hook not in self.buffers:
                self.begin(hook, groups, layout, parameters)

    def plan(self, ticket: Ticket, layout: Layout, parameters: Sequence[Tensor]) -> list[Callable[[], None]]:
        """Prepare what a ticket asks for. Calls of the result do it, after the step, and cannot fail."""
        return [job for move in ticket.averages for job in self._planned(move, ticket, layout, parameters)]

    def _planned(
        self, move: ParameterAverage, ticket: Ticket, layout: Layout, parameters: Sequence[Tensor]
    ) -> Iterator[Callable[[], None]]:
        if move.hook not in self.buffers:
            self.begin(move.hook, list(move.groups), layout, parameters)
        for arena, average in self.buffers[move.hook].items():
            if not average.numel():
                continue
            yield plan_average(average, parameters[arena], move.momentum)
            if move.overwrite and layout.arenas[arena].group not in ticket.frozen:
                yield partial(copy, parameters[arena], average)

    def moved(self, ticket: Ticket, layout: Layout) -> Iterator[Averaged | Span]:
        """What `plan`'s calls overwrite."""
        for move in ticket.averages:
            for arena in self.buffers[move.hook]:
                yield Averaged(move.hook, arena)
                if move.overwrite and layout.arenas[arena].group not in ticket.frozen:
                    yield Span(arena, 0, layout.arenas[arena].elements)

    def copied(self, make: Callable[[Tensor], Tensor]) -> dict[str, dict[int, Tensor]]:
        """All of them, each made by `make`."""
        return {
            hook: {arena: make(average) for arena, average in kept.items()}
            for hook, kept in self.buffers.items()
        }

    def planned_load(
        self, buffers: Buffers, device: torch.device, wanted: Collection[str]
    ) -> Callable[[], None]:
        """Prepare to become a copy's averages, of the hooks that are `wanted`.

        OutOfMemory; a call of the result does it and cannot fail.
        """
        buffers = {hook: sources for hook, sources in buffers.items() if hook in wanted}
        fresh: dict[str, dict[int, Tensor]] = {}
        for hook, sources in buffers.items():
            held = self.buffers.get(hook, {})
            fresh[hook] = {
                arena: held[arena]
                if arena in held
                else take(source.numel(), source.dtype, WHAT, device=device)
                for arena, source in sources.items()
            }

        def fill() -> None:
            for hook, sources in buffers.items():
                for arena, source in sources.items():
                    fresh[hook][arena].copy_(source)
            self.buffers = fresh

        return fill


def overwritten(ticket: Ticket, layout: Layout) -> Iterator[Slot]:
    """The parameters that a ticket replaces by averages."""
    for move in ticket.averages:
        for group in move.groups if move.overwrite else ():
            for arena in layout.arenas_of_group[group] if group not in ticket.frozen else ():
                yield from arena.slots
