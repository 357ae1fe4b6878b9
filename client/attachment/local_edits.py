"""Finds local writes to tensors, whatever made them, before the next push.

torch counts the writes to a tensor, but not those through `.data` or a numpy view of it. So the watch also compares
addresses, and digests of the values that were pulled: of some lines of memory in each step, different ones each time, or
of all of it. Once torch has counted a write to a tensor, that tensor is watched whole, so that later looks can tell
whether a write has changed anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Final, NamedTuple

import torch
from torch import Tensor

from pushstep.optim.ops.samples import Samples

# `p.data = p.data.t()` keeps the address, so the layouts of some tensors are compared in each look: of LAYOUTS_AT_ONCE
# exactly, and with up to CONTIGUITY_UP_TO tensors also whether each is contiguous, in a fifth of an exact look's time.
LAYOUTS_AT_ONCE: Final = 4
CONTIGUITY_UP_TO: Final = 64
_version = attrgetter("_version")


class Seen(NamedTuple):
    """The places of tensors that a look has found.

    `changed`: the values changed. `doubtful`: written to, and perhaps changed. `moved`: the memory or the view is another
    one. `written`: every tensor with a sign of a write, even one of equal values.
    """

    changed: Sequence[int] = ()
    doubtful: Sequence[int] = ()
    moved: Sequence[int] = ()
    written: Sequence[int] = ()


NOTHING: Final = Seen()


class LocalEdits:
    """Watches a list of tensors for writes since the last `settle`; names them by their places in the list."""

    def __init__(self, *, whole: bool = False) -> None:
        """`whole`: find every changed byte; otherwise those that `pushstep.optim.ops.samples` promises to find."""
        self._all_whole = whole
        self._tensors: list[Tensor] = []
        # places watched whole; places of tensors that are pulled by rows
        self._whole: set[int] = set()
        self._tables: set[int] = set()
        # views of the memory at the last settle: they keep it allocated at its address
        self._aliases: list[Tensor] = []
        self._addresses: list[int] = []
        self._contiguous: list[bool] = []
        self._versions: list[int] = []
        self._samples: Samples | None = None
        # the places that the samples treat as whole, and as tables
        self._sampled: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
        # True if the last look found nothing and nothing has changed since: the samples can be used again
        self._lies_as_known = False
        self._turn = 0

    def watch(self, tensors: Sequence[Tensor], whole_bytes: int = 0) -> None:
        """Watch these tensors from the next `settle` on; those of up to `whole_bytes` bytes are watched whole."""
        self._tensors = list(tensors)
        self._whole = {
            place
            for place, tensor in enumerate(self._tensors)
            if self._all_whole or tensor.nbytes <= whole_bytes
        }
        self._tables = set()
        self._samples = None

    def replace(self, place: int, tensor: Tensor) -> None:
        """Watch another tensor at this place; it is expected to hold the same values."""
        self._tensors[place] = tensor
        self._lies_as_known = False

    def settle(self, rows: Mapping[int, Tensor] | None = None) -> None:
        """Take the current values as the expected ones. `rows`: by place, the ids of the only rows that were pulled."""
        if rows and not self._tables.issuperset(rows):
            self._tables |= rows.keys()
            self._lies_as_known = False
        if self._samples is None or not self._lies_as_known:
            self._samples = self._sample(self._samples)
        self._lies_as_known = False
        self._versions = list(map(_version, self._tensors))
        self._turn += 1
        self._samples.take(rows)

    def _sample(self, before: Samples | None) -> Samples:
        """Return samples of the tensors' current memory; `before` if that memory is still the same."""
        addresses = list(map(Tensor.data_ptr, self._tensors))
        sampled = frozenset(self._whole), frozenset(self._tables)
        known = (addresses, sampled) == (self._addresses, self._sampled)
        if before is not None and known and all(map(Tensor.is_set_to, self._tensors, self._aliases)):
            return before
        self._contiguous = list(map(Tensor.is_contiguous, self._tensors))
        self._aliases = [tensor.detach() for tensor in self._tensors]
        self._addresses, self._sampled = addresses, sampled
        return Samples(self._aliases, *sampled)

    def look(self) -> Seen:
        """Return what has happened to the tensors since the last `settle`."""
        self._lies_as_known = False
        if self._samples is None:
            return NOTHING
        versions = list(map(_version, self._tensors))
        addresses = list(map(Tensor.data_ptr, self._tensors))
        if versions != self._versions or addresses != self._addresses or not self._are_laid_out_as_known():
            return self._look_closely(self._samples, versions, addresses)
        changed = self._samples.changed()
        if changed:
            return Seen(changed, written=changed)
        self._lies_as_known = True
        return NOTHING

    def _are_laid_out_as_known(self) -> bool:
        tensors = self._tensors
        if len(tensors) <= LAYOUTS_AT_ONCE:
            return all(map(Tensor.is_set_to, tensors, self._aliases))
        if len(tensors) <= CONTIGUITY_UP_TO and list(map(Tensor.is_contiguous, tensors)) != self._contiguous:
            return False
        stride = -(-len(tensors) // LAYOUTS_AT_ONCE)
        first = self._turn % stride
        return all(map(Tensor.is_set_to, tensors[first::stride], self._aliases[first::stride]))

    def _look_closely(self, samples: Samples, versions: Sequence[int], addresses: Sequence[int]) -> Seen:
        pairs = list(zip(self._tensors, self._aliases, strict=True))
        moved = {
            place
            for place, (tensor, alias) in enumerate(pairs)
            if addresses[place] != self._addresses[place] or not _is_over(tensor, alias)
        }
        gone = [place for place in moved if pairs[place][1].data_ptr() == 0 and pairs[place][1].numel()]
        if gone:  # the storage was resized, so the old values cannot be compared
            return Seen(gone, (), sorted(moved), gone)
        for place in moved:
            # share_memory_ moves tensor and alias together, with their values
            if pairs[place][1].data_ptr() != self._addresses[place]:
                samples.moved(place, pairs[place][1].data_ptr())
        changed = set(samples.changed())
        changed |= {place for place in moved if not same_bits(*pairs[place])}
        # a moved place is another tensor now: its alias has the write count of the tensor before
        written = [
            place
            for place, known in enumerate(self._versions)
            if (pairs[place][1]._version if place in moved else versions[place]) != known
        ]
        self._whole.update(set(written) - samples.whole)
        doubtful = [place for place in written if place not in samples.whole and place not in changed]
        return Seen(sorted(changed), doubtful, sorted(moved), sorted(changed | moved | set(written)))


def _is_over(tensor: Tensor, alias: Tensor) -> bool:
    return tensor.device == alias.device and tensor.dtype == alias.dtype and tensor.is_set_to(alias)


@torch.no_grad()
def same_bits(one: Tensor, other: Tensor) -> bool:
    """True if two strided tensors have equal dtypes, shapes and bits, on whatever devices."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(bits_of(one), bits_of(other.to(one.device)))


def bits_of(tensor: Tensor) -> Tensor:
    """Return a strided tensor's elements as a flat tensor; floats and complex as integers of the same size.

    NaN then equals itself, and -0 does not equal 0.
    """
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    real = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    return real.contiguous().view(_INTEGERS[real.itemsize]) if real.is_floating_point() else real


_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
