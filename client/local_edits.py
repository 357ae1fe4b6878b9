"""What was written to tensors here, by whatever hand: found before the next push.

torch counts the writes to a tensor, but not those that go through `.data` or a numpy view of it. So an address that has
changed is looked for, too, and digests of what came back are compared: of some lines of memory in each step, others
each time, or of all of it. A tensor that torch has counted a write of is watched whole from then on: whether the write
has changed anything is then known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Final, NamedTuple

import torch
from torch import Tensor

from pushstep.optim.samples import Samples

# Layouts are compared of so many tensors at a time: `p.data = p.data.t()` keeps the address.
LAYOUTS_AT_ONCE: Final = 16
_version = attrgetter("_version")


class Seen(NamedTuple):
    """What a look has found, by place: those that have changed; those that were written to and may have; those that moved."""

    changed: Sequence[int] = ()
    doubtful: Sequence[int] = ()
    moved: Sequence[int] = ()

    @property
    def any(self) -> bool:
        """Whether there is anything to be said."""
        return bool(self.changed or self.doubtful or self.moved)


class LocalEdits:
    """Watches tensors, by their places in a list."""

    def __init__(self, *, whole: bool = False) -> None:
        """`whole`: find every write; otherwise those that `samples` says."""
        self._all_whole = whole
        self._tensors: list[Tensor] = []
        # of these, too
        self._whole: set[int] = set()
        # over the memory in which what is known lies, which they keep there
        self._aliases: list[Tensor] = []
        self._addresses: list[int] = []
        self._versions: list[int] = []
        self._samples: Samples | None = None
        # of which the samples are of all bytes
        self._digested_whole: frozenset[int] = frozenset()
        self._turn = 0

    def watch(self, tensors: Sequence[Tensor], whole_bytes: int = 0) -> None:
        """Watch these from the next `settle` on; whole, those of up to `whole_bytes`."""
        self._tensors = list(tensors)
        self._whole = {
            place
            for place, tensor in enumerate(self._tensors)
            if self._all_whole or tensor.nbytes <= whole_bytes
        }
        self._samples = None

    def replace(self, place: int, tensor: Tensor) -> None:
        """Another tensor stands for one from here on: it is to hold what that held."""
        self._tensors[place] = tensor

    def settle(self) -> None:
        """As they are now is as they should be."""
        addresses = list(map(Tensor.data_ptr, self._tensors))
        known = addresses == self._addresses and self._whole == self._digested_whole
        if self._samples is None or not known or not self._lie_as_known():
            self._aliases = [tensor.detach() for tensor in self._tensors]
            self._addresses = addresses
            self._digested_whole = frozenset(self._whole)
            self._samples = Samples(self._aliases, self._digested_whole)
        self._versions = list(map(_version, self._tensors))
        self._turn += 1
        self._samples.take()

    def look(self) -> Seen:
        """What has happened to them since."""
        if self._samples is None:
            return Seen()
        versions = list(map(_version, self._tensors))
        addresses = list(map(Tensor.data_ptr, self._tensors))
        if versions == self._versions and addresses == self._addresses and self._lie_as_known():
            return Seen(self._samples.changed())
        return self._look_closely(self._samples, versions, addresses)

    def _lie_as_known(self) -> bool:
        if len(self._tensors) != len(self._aliases):
            return False
        stride = -(-len(self._tensors) // LAYOUTS_AT_ONCE) or 1
        first = self._turn % stride
        return all(map(Tensor.is_set_to, self._tensors[first::stride], self._aliases[first::stride]))

    def _look_closely(self, samples: Samples, versions: Sequence[int], addresses: Sequence[int]) -> Seen:
        pairs = list(zip(self._tensors, self._aliases, strict=True))
        moved = {
            place
            for place, (tensor, alias) in enumerate(pairs)
            if addresses[place] != self._addresses[place] or not _is_over(tensor, alias)
        }
        gone = [place for place in moved if pairs[place][1].data_ptr() == 0 and pairs[place][1].numel()]
        if gone:  # its storage was resized under it: there is nothing to compare with
            return Seen(gone, (), sorted(moved))
        for place in moved:
            if pairs[place][1].data_ptr() != self._addresses[place]:  # share_memory_ moves both, as they are
                samples.moved(place, pairs[place][1].data_ptr())
        changed = set(samples.changed())
        changed |= {place for place in moved if not same_bits(*pairs[place])}
        # of one that is another tensor now: whether the one before it was written to
        written = [
            place
            for place, known in enumerate(self._versions)
            if (pairs[place][1]._version if place in moved else versions[place]) != known
        ]
        self._whole.update(written)
        doubtful = [place for place in written if place not in self._digested_whole and place not in changed]
        return Seen(sorted(changed), doubtful, sorted(moved))


def _is_over(tensor: Tensor, alias: Tensor) -> bool:
    return tensor.device == alias.device and tensor.dtype == alias.dtype and tensor.is_set_to(alias)


@torch.no_grad()
def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two strided tensors are of the same dtype, shape and bits; wherever they lie."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(_bits(one), _bits(other.to(one.device)))


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    real = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    return real.contiguous().view(_INTEGERS[real.itemsize]) if real.is_floating_point() else real


_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
