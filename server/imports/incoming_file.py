"""A file on its way in: its bytes are set aside before the first is read, and it is kept in memory until it is used."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterable

import torch
from torch import Tensor

from pushstep.proto.errors import DigestMismatch, LengthRequired, MessageTooLarge, WrongLength

from ..process.threads import READS
from ..staging.budget import Budget


class IncomingFile:
    """One file in the staging budget. Owns the bytes that it takes of it, until `release`."""

    def __init__(self, budget: Budget, length_bytes: int | None, most_bytes: int) -> None:
        """LengthRequired without a length, MessageTooLarge if it is beyond `most_bytes`."""
        if length_bytes is None:
            raise LengthRequired()
        if length_bytes > most_bytes:
            raise MessageTooLarge(got=length_bytes, limit=most_bytes)
        self._budget = budget
        self._length_bytes = length_bytes
        self._reserved_bytes = 0
        self.content: Tensor = torch.empty(0, dtype=torch.uint8, device="cpu")

    async def receive(self, owner: str, parts: AsyncIterable[bytes], sha256: bytes | None) -> None:
        """Take room when it is `owner`'s turn, then the parts.

        OverBudget, OverCapacity, MemoryShort. WrongLength if there are fewer or more bytes, DigestMismatch unless their
        SHA-256 is this one.
        """
        self._reserved_bytes = await self._budget.claim(owner, self._length_bytes)
        memory = self._budget.buffer(self._length_bytes)
        view, filled = memory.numpy().data, 0
        async for part in parts:
            until = filled + len(part)
            if until > self._length_bytes:
                raise WrongLength(what="the file", got=until, expected=self._length_bytes)
            view[filled:until] = part
            filled = until
        if filled != self._length_bytes:
            raise WrongLength(what="the file", got=filled, expected=self._length_bytes)
        if sha256 is not None:
            found = await READS.run(lambda: hashlib.sha256(view).digest())
            if found != sha256:
                raise DigestMismatch(got=found.hex(), expected=sha256.hex())
        self.content = memory

    def release(self) -> None:
        """Give the room back."""
        self.content = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._budget.release(self._reserved_bytes)
        self._reserved_bytes = 0
