"""A model's flat buffers: parameters, optimizer state, step counts, and the versions of the last changes.

Only the model's writer thread touches them (`arenas/writer.py`), so nothing here locks. For a parameter that receives
row-sparse gradients, the version of each row's last change is kept, so that readers can be sent the rows they lack.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pushstep.optim.rules.rule import TableRows
from pushstep.proto.types_pb2 import Ticket
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.hyperparameters import values_of
from pushstep.proto.wire.layout import Layout, Slot

from ..captures.capture import PARAMETER, Averaged, Capture, Span, Written
from ..devices.device import Device
from ..process.memory import copy_of, take
from ..staging.gradient import DensePart, RowsPart
from .arenas_copy import ArenasCopy
from .averages import Averages, overwritten
from .extras import Extras
from .finite_watch import FiniteWatch
from .gradients import Part, Take, changed
from .row_changes import RowChanges
from .rules import fill_initial, rule_of, stays_finite

Counts = NDArray[np.int64]
Flags = NDArray[np.bool_]
Indices = slice | NDArray[np.int64]

# Charged for a parameter beside its elements: its name, place and step count. A million of them take 800 MB.
PARAMETER_BYTES: Final = 1 << 10
FRESH: Final[Take] = partial(torch.empty, dtype=torch.uint8, device="cpu")


class Arenas:
    """The buffers of one model at one version."""

    def __init__(self, layout: Layout, device: Device) -> None:
        self.layout = layout
        self.device_stream = device.device_stream()
        self.device = device.where
        self.parameters, self.states = self._made(layout, 0)
        # integers, by parameter: a count in float32 stops at 2**24
        self.steps = np.zeros(len(layout.slots), np.int64)
        self.version = 0
        self.timeline = 1
        self.changed = np.zeros(len(layout.slots), np.int64)
        self.row_changes = RowChanges()
        self._tables: dict[tuple[int, str], Tensor] = {}
        self.averages = Averages()
        self.watch = FiniteWatch()
        # between two versions: a write has begun and was not finished
        self.torn = False
        # the version that a snapshot is being made of
        self.capture: Capture | None = None

    @contextmanager
    def writing(self, parts: Iterable[Written]) -> Iterator[None]:
        """A block that replaces one version by another. After an error the arenas are torn until a load.

        parts: all that it overwrites. A snapshot that is being read has it saved first.
        """
        if self.capture is not None and not self.capture.save(parts):
            self.capture = None
        self.torn = True
        yield
        self.torn = False

    def _made(self, layout: Layout, first: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """Parameters and states, all zeros, for the arenas of a layout from `first` on. OutOfMemory."""
        parameters: list[Tensor] = []
        states: list[dict[str, Tensor]] = []
        with self.device_stream.here():
            for arena in layout.arenas[first:]:
                rule, dtype = rule_of(layout, arena.group), dtypes.state_dtype(arena.dtype)
                parameters.append(self._zeros(arena.elements, arena.dtype))
                states.append({name: self._zeros(arena.elements, dtype) for name in rule.state_names})
        return parameters, states

    def _zeros(self, elements: int, dtype: torch.dtype) -> Tensor:
        what = "the model's parameters and optimizer state"
        return take(elements, dtype, what, device=self.device, zeros=True)

    @staticmethod
    def bytes_needed(layout: Layout) -> int:
        """Bytes that the buffers of a model with this layout take."""
        total = 0
        for arena in layout.arenas:
            states = len(rule_of(layout, arena.group).state_names)
            state_bytes = dtypes.state_dtype(arena.dtype).itemsize
            total += arena.elements * (arena.dtype.itemsize + states * state_bytes)
        return total

    @staticmethod
    def bytes_charged(layout: Layout) -> int:
        """Bytes that a model with this layout counts for.

        They are its buffers, what its tied weights add to a checkpoint, its layout, and each row's last-changed version.
        """
        return (
            Arenas.bytes_needed(layout)
            + layout.alias_bytes
            + PARAMETER_BYTES * len(layout.slots)
            + torch.int64.itemsize * layout.rows
        )

    def flat(self, arena: int, state: str = "") -> Tensor:
        """A whole arena: the parameters, or one of their states."""
        return self.states[arena][state] if state else self.parameters[arena]

    def view(self, slot: Slot, state: str = "") -> Tensor:
        """One parameter (or its state) in its own shape. That of a table which rows have changed is made once."""
        if (found := self._tables.get((slot.index, state))) is None:
            found = self.flat(slot.arena, state)[slot.start : slot.stop].view(slot.shape)
            if slot.index in self.row_changes.versions:
                self._tables[slot.index, state] = found
        return found

    def state_names(self, slot: Slot) -> tuple[str, ...]:
        """torch's names of a parameter's states."""
        return rule_of(self.layout, slot.group).state_names

    def fill_initial_state(self, values: Sequence[Mapping[str, float | bool]]) -> None:
        """Fill the states with their rules' initial values. values: the hyperparameters of all groups."""
        with self.device_stream.here():
            fill_initial(self.layout, self.states, values, 0)

    def begin_anew(self, slots: Iterable[Slot], values: Sequence[Mapping[str, float | bool]]) -> None:
        """Reset the states and step counts of parameters, in a block of `writing`.

        values: the hyperparameters of all groups.
        """
        with self.device_stream.here():
            for slot in slots:
                rule = rule_of(self.layout, slot.group)
                for name in rule.state_names:
                    self.view(slot, name).fill_(rule.initial_value(name, values[slot.group]))
                self.steps[slot.index] = 0
                self.mark_changed(slot, self.version)

    def step(
        self,
        ticket: Ticket,
        parts: Sequence[Part],
        copy_out: Sequence[Tensor] | None = None,
        take: Take = FRESH,
    ) -> tuple[Flags, float]:
        """Execute a ticket. Nothing is decided here: equal buffers and an equal ticket give equal bits.

        Everything is prepared before the first write. An error until then changes no value; the arenas are at the
        ticket's version, which then moved nothing. `copy_out`, one tensor for each arena, receives the new parameters
        of the dense parts in the same pass. take: allocates memory for gradients that hooks change. Returns, for each
        slot, whether it was written to `copy_out`, and the factor that clipping multiplied all gradients by.
        """
        factor = clipped = float(ticket.factor)
        values = [values_of(group) for group in ticket.groups]
        for group in values:
            group["lr"] = float(group["lr"]) * ticket.lr_scale
        try:
            if ticket.operations:
                parts, factor, clipped = changed(ticket, parts, take)
            if ticket.frozen:
                parts = [part for part in parts if self._group_of(part) not in ticket.frozen]
            moves: Sequence[Callable[[], None]] = ()
            if ticket.averages:
                moves = self.averages.plan(ticket, self.layout, self.parameters)
            if moves and any(overwritten(ticket, self.layout)):
                copy_out = None  # it would not receive what the parameters become
            steps = list(self._planned(parts, values, factor, copy_out, ticket.version))
        finally:
            self.version = ticket.version
        with self.writing([*parts, *self.averages.moved(ticket, self.layout)] if moves else parts):
            for step in steps:
                step()
            written = np.zeros(len(self.steps), np.bool_)
            for part in parts:
                if isinstance(part, RowsPart):
                    self.steps[part.slot.index] += 1
                    self.row_changes.add(part.slot, part.ids, ticket.version)
                else:
                    where = indices_of(part.slots)
                    self.steps[where] += 1
                    self._mark(part.slots, where, ticket.version)
                    written[where] = copy_out is not None
            for move in moves:
                move()
            for slot in overwritten(ticket, self.layout) if moves else ():
                self.mark_changed(slot, ticket.version)
        self.watch.stepped(self.layout, self.parameters, parts)
        return written, clipped

    def _planned(
        self,
        parts: Sequence[Part],
        values: Sequence[Mapping[str, float | bool]],
        factor: float,
        copy_out: Sequence[Tensor] | None,
        version: int,
    ) -> Iterator[Callable[[], None]]:
        tables: dict[int, list[RowsPart]] = {}
        for part in parts:
            if isinstance(part, RowsPart):
                tables.setdefault(part.slot.arena, []).append(part)
            else:
                for run in _equal_runs(part.slots, self.steps[indices_of(part.slots)]):
                    if run[0].start < run[-1].stop:  # without elements only the step is counted, as in torch
                        yield self._planned_dense(part, run, values, factor, copy_out)
        for some in tables.values():
            yield self._planned_tables(some, values, factor, version)

    def _planned_dense(
        self,
        part: DensePart,
        run: Sequence[Slot],
        values: Sequence[Mapping[str, float | bool]],
        factor: float,
        copy_out: Sequence[Tensor] | None,
    ) -> Callable[[], None]:
        arena, start, stop = part.arena, run[0].start, run[-1].stop
        rule = rule_of(self.layout, run[0].group)
        return rule.plan_dense(
            _between(self.parameters[arena], start, stop),
            _between(part.gradient, start - part.start, stop - part.start),
            [_between(self.states[arena][name], start, stop) for name in rule.state_names],
            values[run[0].group],
            step=int(self.steps[run[0].index]) + 1,
            factor=factor,
            copy_out=None if copy_out is None else _between(copy_out[arena], start, stop),
        )

    def _planned_tables(
        self,
        parts: Sequence[RowsPart],
        values: Sequence[Mapping[str, float | bool]],
        factor: float,
        version: int,
    ) -> Callable[[], None]:
        """The step over rows of tables of one arena, which also writes the version of each row's change."""
        rule, group = rule_of(self.layout, parts[0].slot.group), values[parts[0].slot.group]
        tables = []
        for part in parts:
            slot, count = part.slot, int(self.steps[part.slot.index]) + 1
            marks = self.row_changes.of(slot, int(self.changed[slot.index]), self.version, self.device)
            states = [self.view(slot, name) for name in rule.state_names]
            tables.append(TableRows(self.view(slot), part.ids, part.rows, states, count, marks))
        return rule.plan_tables(tables, group, factor=factor, mark=version)

    def applied_lrs(self, ticket: Ticket) -> dict[int, float]:
        """Each group's learning rate in the step just taken, by the step count of its first parameter."""
        lrs: dict[int, float] = {}
        for group, slot in self.layout.first_of_group.items():
            if group < len(ticket.groups):
                values = values_of(ticket.groups[group])
                rule = rule_of(self.layout, group)
                lrs[group] = rule.effective_lr(values, max(1, int(self.steps[slot.index]))) * ticket.lr_scale
        return {group: 0.0 if group in ticket.frozen else lr for group, lr in lrs.items()}

    def _group_of(self, part: DensePart | RowsPart) -> int:
        return part.slot.group if isinstance(part, RowsPart) else self.layout.arenas[part.arena].group

    def mark_changed(self, slot: Slot, version: int) -> None:
        """Note that every element of a parameter may have changed in `version`."""
        self._mark((slot,), slice(slot.index, slot.index + 1), version)

    def _mark(self, slots: Sequence[Slot], where: Indices, version: int) -> None:
        self.changed[where] = version
        for index in self.row_changes.versions:
            if slots[0].index <= index <= slots[-1].index and self.changed[index] == version:
                self.row_changes.all_of(index, version)

    def extended(self, layout: Layout, values: Sequence[Mapping[str, float | bool]]) -> ArenasCopy:
        """These arenas with fresh ones for the further groups of `layout`. OutOfMemory.

        `adopt` takes the result and cannot fail any more. Call it in any thread: it reads and writes no element of the
        present arenas.
        """
        first = len(self.parameters)
        parameters, states = self._made(layout, first)
        extension = ArenasCopy(
            layout, self.timeline, self.version, [*self.parameters, *parameters], [*self.states, *states], []
        )
        with self.device_stream.here():
            fill_initial(layout, extension.states, values, first)
        return extension

    def adopt(self, extension: ArenasCopy) -> None:
        """Use the arenas that `extended` made, once their values have been filled in."""
        self.layout = extension.layout
        self.parameters, self.states = extension.parameters, extension.states
        added = len(self.layout.slots) - len(self.steps)
        self.steps = np.concatenate([self.steps, np.zeros(added, np.int64)])
        self.changed = np.concatenate([self.changed, np.full(added, self.version, np.int64)])

    def stays_finite(self, group: int, values: Mapping[str, float | bool]) -> bool:
        """True if trial steps with these hyperparameters keep a sample of finite elements finite."""
        return stays_finite(self.layout, self.parameters, self.states, self.steps.tolist(), group, values)

    def begin_averages(self, hook: str, groups: Sequence[int]) -> None:
        """Have averages for a hook, equal to the parameters. OutOfMemory."""
        if self.capture is not None:
            self.capture.save(Averaged(hook, arena.index) for arena in self.layout.arenas)
        self.averages.begin(hook, groups, self.layout, self.parameters)

    def _all(self) -> list[Span | Averaged]:
        spans = [Span(arena.index, 0, arena.elements) for arena in self.layout.arenas]
        averaged = [Averaged(hook, arena) for hook, kept in self.averages.buffers.items() for arena in kept]
        return [*spans, *averaged]

    def captured(self, extras: Extras, lineage: Sequence[tuple[int, int]]) -> Capture:
        """This version for one reader, in any thread, until it closes it. Later writes save what it still needs."""
        if self.capture is not None and self.capture.is_open:
            raise RuntimeError("one version is being read already")
        self.capture = Capture(
            self.layout,
            self.timeline,
            self.version,
            [{PARAMETER: a, **b} for a, b in zip(self.parameters, self.states, strict=True)],
            self.steps.tolist(),
            extras,
            lineage,
            self.averages.copied(lambda average: average),
            self.row_changes.versions,
            self.device_stream,
        )
        return self.capture

    def copy(self) -> ArenasCopy:
        """A copy of everything at this version, in memory of its own on the CPU. OutOfMemory."""
        return self._copied(lambda flat: copy_of(flat, "a copy of the model"))

    def as_copy(self) -> ArenasCopy:
        """Like `copy`, but arenas on the CPU are shared and not copied.

        Only if nobody writes to them any more.
        """
        return self._copied(lambda flat: flat if flat.is_cpu else copy_of(flat, "a copy of the model"))

    def _copied(self, make: Callable[[Tensor], Tensor]) -> ArenasCopy:
        return ArenasCopy(
            self.layout,
            self.timeline,
            self.version,
            [make(flat) for flat in self.parameters],
            [{name: make(flat) for name, flat in states.items()} for states in self.states],
            self.steps.tolist(),
            averages=self.averages.copied(make),
        )

    def load(self, copy: ArenasCopy, timeline: int, averaging: Collection[str] = ()) -> None:
        """Become `copy`, on `timeline`. Readers of any earlier timeline must fetch everything again.

        averaging: the hooks whose averages are kept.
        """
        fill_averages = self.averages.planned_load(copy.averages, self.device, averaging)
        with self.writing(self._all()):
            fill_averages()
            for flat, source in zip(self.parameters, copy.parameters, strict=True):
                flat.copy_(source)
            for states, sources in zip(self.states, copy.states, strict=True):
                for name, flat in states.items():
                    flat.copy_(sources[name])
            self.steps = np.array(copy.steps, np.int64)
            self.version, self.timeline = copy.version, timeline
            for slot in self.layout.slots:
                self.mark_changed(slot, copy.version)
        self.watch.look(self.layout, self.parameters)


def _between(flat: Tensor, start: int, stop: int) -> Tensor:
    """Elements [start, stop).

    `flat` itself if that is all of it: a view takes as long as a step of some hundred.
    """
    return flat if stop - start == flat.numel() else flat[start:stop]


def indices_of(slots: Sequence[Slot]) -> Indices:
    """The indices of parameters in ascending order, to pick theirs of what there is for each parameter."""
    first, last = slots[0].index, slots[-1].index
    if last - first + 1 == len(slots):
        return slice(first, last + 1)
    return np.fromiter((slot.index for slot in slots), np.int64, len(slots))


def _equal_runs(slots: Sequence[Slot], steps: Counts) -> Iterator[Sequence[Slot]]:
    """Neighbouring slots with an equal number of steps, grouped: each group is one kernel call."""
    borders = [0, *(np.flatnonzero(np.diff(steps)) + 1).tolist(), len(slots)]
    return (slots[start:stop] for start, stop in pairwise(borders))
