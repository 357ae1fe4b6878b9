"""The parameters of an attached optimizer, by the model's names, and the version that they hold.

They are the user's own tensors. Pulled values are copied into them. The next pull would overwrite any other change, so
changes are found before the next push (see `client/attachment/local_edits.py`). Several tensors that are the same view of
one memory are one parameter, whose gradient is the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import Final

import torch
from torch import Tensor

from pushstep.proto.errors import UnsupportedModule, WrongDtype, WrongShape
from pushstep.proto.wire.layout import Layout, Slot

from ..gradients.body import Rows, as_gradient, check_ids
from ..transport.streams import Pulled
from .local_edits import NOTHING, LocalEdits, same_bits
from .received import Into
from .tensors import check_parameter, firsts

_PLAIN: Final = {Tensor}
_STRIDED: Final = {torch.strided}
_grad, _dtype, _shape, _layout = map(attrgetter, ("grad", "dtype", "shape", "layout"))


class _Placed:
    """The parameters in their slots of a layout, for as long as both stay."""

    def __init__(self, layout: Layout, slots: list[Slot], tensors: list[Tensor]) -> None:
        self.layout = layout
        self.slots = slots
        self.tensors = tensors
        self._dtypes = [slot.dtype for slot in slots]
        self._shapes = [slot.shape for slot in slots]

    def are_usual(self, gradients: list[Tensor | None]) -> bool:
        """True if each parameter has a strided gradient of its dtype and shape: in loops of C, 0.2 us for each."""
        return (
            set(map(type, gradients)) == _PLAIN
            and list(map(_dtype, gradients)) == self._dtypes
            and set(map(_layout, gradients)) == _STRIDED
            and list(map(_shape, gradients)) == self._shapes
        )


class Parameters:
    """Owns the tensors by name; `at` is the (timeline, version) that they hold, None before the first pull."""

    def __init__(self, model: str, *, watch_whole: bool = False) -> None:
        self.at: tuple[int, int] | None = None
        # names whose tensor was replaced in its group: their state begins anew with the next version
        self.fresh: list[str] = []
        # names that `edited` has found written to, even with equal values
        self.written: Collection[str] = ()
        self._model = model
        self._lists: list[list[Tensor]] = []
        self._by_name: dict[str, Tensor] = {}
        self._names: dict[int, str] = {}
        # by name, the further tensors over the same memory
        self._others: dict[str, list[Tensor]] = {}
        self._places: dict[str, list[int]] = {}
        self._edits = LocalEdits(whole=watch_whole)
        self._placed: _Placed | None = None
        self._into = Into()

    def add(self, lists: Sequence[Sequence[Tensor]], names: Sequence[Sequence[str]]) -> None:
        """Add the tensors of whole groups, with their names; tensors of one name are one parameter."""
        for tensors, named in zip(lists, names, strict=True):
            self._lists.append(list(tensors))  # first, because `keep` undoes a broken-off add by this list
            for tensor, name in zip(tensors, named, strict=True):
                self._names[id(tensor)] = name
                if self._by_name.setdefault(name, tensor) is not tensor:
                    self._others.setdefault(name, []).append(tensor)
        self._watch()

    def keep(self, groups: int) -> None:
        """Keep only the first `groups` groups: the others were not added after all."""
        for tensor in chain.from_iterable(self._lists[groups:]):
            name = self._names.pop(id(tensor), "")
            self._by_name.pop(name, None)
            self._others.pop(name, None)
        del self._lists[groups:]
        self._watch()

    def _watch(self) -> None:
        self._placed = None
        self._into = Into()
        self._places = {name: [] for name in self._by_name}
        tensors = list(chain.from_iterable(self._lists))
        for place, tensor in enumerate(tensors):
            self._places[self._names[id(tensor)]].append(place)
        self._edits.watch(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @property
    def by_name(self) -> Mapping[str, Tensor]:
        """The parameters by name; of several tensors over one memory, the first."""
        return self._by_name

    def single(self) -> list[Tensor]:
        """Return the parameters that are one tensor each."""
        return [tensor for name, tensor in self._by_name.items() if name not in self._others]

    def name_of(self, parameter: Tensor) -> str:
        """Return the model's name of a parameter."""
        return self._names[id(parameter)]

    def slot_of(self, parameter: Tensor, layout: Layout) -> Slot:
        """Return a parameter's slot in the model."""
        return layout.slot(self.name_of(parameter), self._model)

    def values(self, layout: Layout, names: Collection[str] | None = None) -> dict[tuple[Slot, str], Tensor]:
        """Return all or some parameters by (slot, "") for an upload. Raises WrongShape or WrongDtype on a change."""
        found = {}
        for name in self._by_name if names is None else names:
            slot, tensor = layout.slot(name, self._model), self._by_name[name]
            _check_same_kind(slot, tensor)
            found[slot, ""] = tensor
        return found

    def gradients(self, layout: Layout) -> dict[Slot, Tensor | Rows]:
        """Return the gradients of the parameters that have one."""
        if self._placed is None or self._placed.layout is not layout:
            slots = [layout.slot(name, self._model) for name in self._by_name]
            self._placed = _Placed(layout, slots, list(self._by_name.values()))
        placed = self._placed
        if not self._others:
            gradients = list(map(_grad, placed.tensors))
            if placed.are_usual(gradients):
                return dict(zip(placed.slots, gradients, strict=True))
        found: dict[Slot, Tensor | Rows] = {}
        for slot, parameter in zip(placed.slots, placed.tensors, strict=True):
            gradient = parameter.grad
            others = self._others.get(slot.name) if self._others else None
            if others:
                gradient = _summed([p.grad for p in (parameter, *others) if p.grad is not None])
            if gradient is None:
                continue
            # what `as_gradient` finds of nearly every gradient, without calls
            fits = gradient.dtype is slot.dtype and gradient.shape == slot.shape
            usual = fits and gradient.layout is torch.strided
            found[slot] = gradient if usual else as_gradient(gradient, slot)
        check_ids(found)
        return found

    # Tensors that are replaced in the groups.

    def follow(
        self, lists: Sequence[Sequence[Tensor]], layout: Callable[[], Layout]
    ) -> list[tuple[Tensor, Tensor]]:
        """Take up tensors that replaced others in the groups; return the pairs (old, new).

        Raises UnsupportedModule, WrongShape or WrongDtype, naming the parameter, if the new one cannot stand for it.
        """
        if len(lists) == len(self._lists) and all(map(_are_same, lists, self._lists)):
            return []
        if list(map(len, lists)) != list(map(len, self._lists)):
            here, there = list(map(len, lists)), list(map(len, self._lists))
            raise UnsupportedModule(
                problem=f"the groups have {here} parameters here and {there} in the model: add_param_group() adds a group, "
                "and a parameter without a gradient is not stepped"
            )
        replaced = [
            (old, new)
            for now, known in zip(lists, self._lists, strict=True)
            for old, new in zip(known, now, strict=True)
            if old is not new
        ]
        self._check_replaced(replaced, lists, layout())
        for number, now in enumerate(lists):
            self._lists[number] = list(now)
        for old, new in replaced:
            name = self._names.pop(id(old))
            self._names[id(new)] = name
            self._by_name[name] = new
            self._edits.replace(self._places[name][0], new)
            if name not in self.fresh:
                self.fresh.append(name)
        self._placed = None
        self._into = Into()
        return replaced

    def _check_replaced(
        self, replaced: Sequence[tuple[Tensor, Tensor]], lists: Sequence[Sequence[Tensor]], layout: Layout
    ) -> None:
        for old, new in replaced:
            name = self._names[id(old)]
            if id(new) in self._names or sum(new is other for _, other in replaced) > 1:
                raise UnsupportedModule(
                    problem=f"in the groups another parameter stands in the place of {name!r}: their order is the model's"
                )
            if name in self._others:
                raise UnsupportedModule(
                    problem=f"{name!r} is one memory under several names, of which one alone cannot be replaced"
                )
            check_parameter(new, name)
            _check_same_kind(layout.slot(name, self._model), new)
        names = self._names | {id(new): self._names[id(old)] for old, new in replaced}
        _check_apart([(names[id(tensor)], tensor) for tensor in chain.from_iterable(lists)])

    # Local writes.

    def seem_written(self) -> bool:
        """True if a parameter has changed, or may have, since the parameters were last taken or sent."""
        seen = self._edits.look()
        return bool(seen.changed or seen.doubtful)

    def edited(self, newest: Callable[[], Pulled], layout: Callable[[], Layout]) -> list[str]:
        """Return the names of the parameters that differ from the server's version.

        If a write is known, but not whether it changed anything, the parameter is compared with the `newest` version: a
        checkpoint that is loaded at the version of its save changes nothing. Raises WrongShape or WrongDtype if an edited
        parameter has changed its own, and UnsupportedModule if tensors share memory otherwise than at attach.
        """
        seen = self._edits.look()
        if seen is NOTHING:
            self.written = ()
            return []
        self.written = {self._name_at(place) for place in seen.written}
        found = {self._name_at(place) for place in seen.changed}
        unsure = {self._name_at(place) for place in seen.doubtful} - found
        if unsure:
            found |= unsure - self._equal(unsure, newest())
        names = [name for name in self._by_name if name in found]
        for name in names:
            _check_same_kind(layout().slot(name, self._model), self._by_name[name])
        if seen.moved:
            self._check_tied()
        if not names:
            self._edits.settle()
        return names

    def _name_at(self, place: int) -> str:
        for tensors in self._lists:
            if place < len(tensors):
                return self._names[id(tensors[place])]
            place -= len(tensors)
        raise IndexError(place)

    def _equal(self, names: Collection[str], pulled: Pulled) -> set[str]:
        """Return the names whose values equal the pulled ones; none if the pull has another version than `at`."""
        if (pulled.header.timeline, pulled.header.version) != self.at:
            return set()
        return {
            slot.name
            for slot, _, values in pulled.dense()
            if slot.name in names and same_bits(self._by_name[slot.name], values.to(slot.dtype))
        }

    def _check_tied(self) -> None:
        """Raise UnsupportedModule unless the same tensors share memory as at attach."""
        _check_apart([(self._names[id(tensor)], tensor) for tensor in chain.from_iterable(self._lists)])
        for name, others in self._others.items():
            if any(other.data_ptr() != self._by_name[name].data_ptr() for other in others):
                raise UnsupportedModule(
                    problem=f"the tensors of {name!r} were one memory at attach, and are not any more: they cannot be "
                    "stepped apart"
                )

    def note(self, timeline: int, version: int) -> None:
        """Take the current values as those of this version."""
        self.at = (timeline, version)
        self._edits.settle()

    def settle(self) -> None:
        """Take the current values as the expected ones; `at` stays."""
        self._edits.settle()

    def take(self, pulled: Pulled) -> None:
        """Copy pulled values into the parameters and move `at` to their version."""
        by_name = self._by_name
        self._into.take(pulled, by_name)
        came = {self._places[name][0]: ids for name, ids in self._into.take_rows(pulled, by_name).items()}
        self.at = (pulled.header.timeline, pulled.header.version)
        self._edits.settle(came)


def _are_same(now: Sequence[Tensor], known: Sequence[Tensor]) -> bool:
    return len(now) == len(known) and all(map(is_, now, known))


def _check_apart(named: Sequence[tuple[str, Tensor]]) -> None:
    """Raise UnsupportedModule if parameters of different names lie over one memory."""
    for place, first in enumerate(firsts(named)):
        if named[first][0] != named[place][0]:
            raise UnsupportedModule(
                problem=f"{named[place][0]!r} lies over the memory of {named[first][0]!r} now, and did not at attach: "
                "give it memory of its own"
            )


def _check_same_kind(slot: Slot, tensor: Tensor) -> None:
    """Raise WrongShape or WrongDtype if a tensor no longer has its parameter's shape and dtype."""
    what = f"parameter {slot.name!r}"
    if tuple(tensor.shape) != slot.shape:
        raise WrongShape(what=what, got=tuple(tensor.shape), expected=f"{slot.shape}, as it was attached")
    if tensor.dtype != slot.dtype:
        raise WrongDtype(what=what, got=tensor.dtype, expected=f"{slot.dtype}, as it was attached")


def _summed(gradients: Sequence[Tensor]) -> Tensor | None:
    """Return the sum of the gradients, in order; dense if one of them is; None if there is none."""
    if not gradients:
        return None
    total = gradients[0]
    for gradient in gradients[1:]:
        total = gradient + total if total.is_sparse and not gradient.is_sparse else total + gradient
    return total
