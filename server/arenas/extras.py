"""What a model holds beside its parameters: a module's buffers and frozen values.

Exports, snapshots and workers need them.
They come as safetensors files of the tensors that have changed. Their version is a hash of their content, so equal
content has an equal version, also after a restart or a restore.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
import xxhash
from safetensors.torch import save
from torch import Tensor


class Extras(dict[str, Tensor]):
    """Tensors by name. Replaced as a whole, never written to."""

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, known: Self | None = None) -> None:
        """Reads every tensor, except those that are in `known`. If there are many, call it in a thread."""
        super().__init__(tensors or {})
        self._digests: dict[str, int] = {
            name: known._digests[name] if known is not None and known.get(name) is tensor else _digest(tensor)
            for name, tensor in self.items()
        }
        content = sorted(self._digests.items())
        self.version = (xxhash.xxh3_64_intdigest(repr(content).encode()) or 1) if content else 0
        self.nbytes = sum(tensor.nbytes for tensor in self.values())

    def file(self) -> bytes:
        """All of them as a safetensors file."""
        return save(dict(self))


def _digest(tensor: Tensor) -> int:
    shape = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_64_intdigest(flat.numpy().data, xxhash.xxh3_64_intdigest(shape))
