"""Which tensors can be parameters of a model, and which tensors are one parameter.

If two parameters share memory, torch steps that memory twice. The server holds each parameter separately, so two copies
of one memory would diverge, and the copy that is pulled last would win. Tensors that are the same view of the same memory
are therefore one parameter with two names. Any other overlap is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from pushstep.optim.ops.samples import is_dense
from pushstep.proto.errors import UnsupportedModule
from pushstep.proto.wire import dtypes


def check_parameter(parameter: Tensor, name: str) -> None:
    """Raise UnsupportedModule or WrongDtype for a tensor that the server cannot step or that cannot be written here."""
    if type(parameter).__name__ == "DTensor" or hasattr(parameter, "placements"):
        raise UnsupportedModule(
            problem=f"parameter {name!r} is a DTensor, a shard of a tensor: attach the whole one"
        )
    if is_lazy(parameter):
        raise UnsupportedModule(
            problem=f"parameter {name!r} has no shape yet: run the module once before attach"
        )
    dtypes.to_wire(parameter.dtype, f"parameter {name!r}")
    if parameter.layout is not torch.strided:
        raise UnsupportedModule(
            problem=f"parameter {name!r} is {parameter.layout}, and the server steps dense ones"
        )
    if parameter.is_meta:
        raise UnsupportedModule(
            problem=f"parameter {name!r} is on the meta device: give it values before attach"
        )
    if parameter.is_inference():
        raise UnsupportedModule(
            problem=f"parameter {name!r} was made in inference mode, so nothing may write to it elsewhere: make it without"
        )
    if not is_dense(parameter) and int(_marks(parameter, *_span(parameter)).sum()) != parameter.nbytes:
        raise UnsupportedModule(
            problem=f"elements of parameter {name!r} lie in the same memory (an expanded tensor): clone it first"
        )


def firsts(named: Sequence[tuple[str, Tensor]]) -> list[int]:
    """For each parameter, return the index of the first that is the same view of the same memory: its own, if it is the first.

    Raises UnsupportedModule, naming both, for parameters that share some of their elements in another way.
    """
    by_storage: dict[tuple[torch.device, int], list[int]] = {}
    for place, (_, parameter) in enumerate(named):
        if parameter.numel():
            key = parameter.device, parameter.untyped_storage().data_ptr()
            by_storage.setdefault(key, []).append(place)
    found = list(range(len(named)))
    for places in by_storage.values():
        if len(places) > 1:
            _find_same(named, places, found)
            _check_apart(named, [place for place in places if found[place] == place])
    return found


def _find_same(named: Sequence[tuple[str, Tensor]], places: Sequence[int], found: list[int]) -> None:
    seen: dict[tuple[object, ...], int] = {}
    for place in places:
        parameter = named[place][1]
        view = (parameter.data_ptr(), parameter.dtype, tuple(parameter.shape), parameter.stride())
        found[place] = seen.setdefault(view, place)


def _check_apart(named: Sequence[tuple[str, Tensor]], places: Sequence[int]) -> None:
    spans = sorted((*_span(named[place][1]), place) for place in places)
    reaching: list[tuple[int, int]] = []
    for start, stop, place in spans:
        reaching = [(end, earlier) for end, earlier in reaching if end > start]
        for _, earlier in reaching:
            if _share(named[earlier][1], named[place][1]):
                names = " and ".join(repr(named[each][0]) for each in sorted((earlier, place)))
                raise UnsupportedModule(
                    problem=f"parameters {names} share some of their memory and are not the same view of it: give each "
                    "memory of its own, or make them one parameter"
                )
        reaching.append((stop, place))


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the address of the first byte, and the address after the last byte."""
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def _marks(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return a bool per byte of [start, stop): True for the bytes that belong to the tensor."""
    marks = torch.zeros(stop - start, dtype=torch.bool, device="cpu")
    size, stride = (*tensor.shape, tensor.itemsize), (*(s * tensor.itemsize for s in tensor.stride()), 1)
    marks.as_strided(size, stride, tensor.data_ptr() - start).fill_(True)
    return marks


def _share(one: Tensor, other: Tensor) -> bool:
    if one.device != other.device:
        return False
    (a, b), (c, d) = _span(one), _span(other)
    start, stop = min(a, c), max(b, d)
    return bool((_marks(one, start, stop) & _marks(other, start, stop)).any())
