"""What was written to tensors here, by whatever hand: found before the next push.

torch counts the writes to a tensor, but not those that go through `.data` or a numpy view of it. So an address that has
changed is looked for, too, and digests of what came back are compared: of some lines of memory in each step, others
each time, or of all of it. A tensor that torch has counted a write of is watched whole from then on: whether the write
has changed anything is then known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Final, NamedTuple

import torch
from torch import Tensor

from pushstep.optim.samples import Samples

# Layouts are compared, whole, of so many tensors at a time: `p.data = p.data.t()` keeps the address. Of so many it is
# looked each time whether they are contiguous, which takes a fifth of the time.
LAYOUTS_AT_ONCE: Final = 4
CONTIGUITY_UP_TO: Final = 64
_version = attrgetter("_version")


class Seen(NamedTuple):
    """What a look has found, by place.

    Those that have changed; those that were written to and may have; those that moved; all of which there is a sign that
    somebody wrote to them, if only what they held.
    """

    changed: Sequence[int] = ()
    doubtful: Sequence[int] = ()
    moved: Sequence[int] = ()
    written: Sequence[int] = ()


NOTHING: Final = Seen()


class LocalEdits:
    """Watches tensors, by their places in a list."""

    def __init__(self, *, whole: bool = False) -> None:
        """`whole`: find every write; otherwise those that `samples` says."""
        self._all_whole = whole
        self._tensors: list[Tensor] = []
        # of these every write is found, too; those come by rows
        self._whole: set[int] = set()
        self._tables: set[int] = set()
        # over the memory in which what is known lies, which they keep there
        self._aliases: list[Tensor] = []
        self._addresses: list[int] = []
        self._contiguous: list[bool] = []
        self._versions: list[int] = []
        self._samples: Samples | None = None
        # which are sampled whole, and as tables
        self._sampled: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
        # the last look has found nothing, and nothing has come since
        self._lies_as_known = False
        self._turn = 0

    def watch(self, tensors: Sequence[Tensor], whole_bytes: int = 0) -> None:
        """Watch these from the next `settle` on; whole, those of up to `whole_bytes`."""
        self._tensors = list(tensors)
        self._whole = {
            place
            for place, tensor in enumerate(self._tensors)
            if self._all_whole or tensor.nbytes <= whole_bytes
        }
        self._tables = set()
        self._samples = None

    def replace(self, place: int, tensor: Tensor) -> None:
        """Another tensor stands for one from here on: it is to hold what that held."""
        self._tensors[place] = tensor
        self._lies_as_known = False

    def settle(self, rows: Mapping[int, Tensor] | None = None) -> None:
        """As they are now is as they should be. rows: of tensors of which only some have come, by their places."""
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
        """Samples of the memory in which they lie now; those of `before` if that is the same."""
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
        """What has happened to them since."""
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
        if gone:  # its storage was resized under it: there is nothing to compare with
            return Seen(gone, (), sorted(moved), gone)
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
        self._whole.update(set(written) - samples.whole)
        doubtful = [place for place in written if place not in samples.whole and place not in changed]
        return Seen(sorted(changed), doubtful, sorted(moved), sorted(changed | moved | set(written)))


def _is_over(tensor: Tensor, alias: Tensor) -> bool:
    return tensor.device == alias.device and tensor.dtype == alias.dtype and tensor.is_set_to(alias)


@torch.no_grad()
def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two strided tensors are of the same dtype, shape and bits; wherever they lie."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(bits_of(one), bits_of(other.to(one.device)))


def bits_of(tensor: Tensor) -> Tensor:
    """A strided tensor's elements in one row, as integers of their size: so that NaN is equal to itself, and -0 not to 0."""
    flat = tensor.detach().resolve_conj().resolve_neg().reshape(-1)
    real = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    return real.contiguous().view(_INTEGERS[real.itemsize]) if real.is_floating_point() else real


_INTEGERS: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
