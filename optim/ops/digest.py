"""xxh3-64 of bytes on a device, without a copy of them to the host. The result is xxhash's number.

xxh3 takes its input in blocks of 1024 bytes. A block adds to each of the eight 64-bit lanes a sum of products modulo
2^64. The sum depends on nothing before the block and may be added up in any order. So the device computes the sums of
all blocks at once, by torch's integer operations, which wrap around. Between two blocks the lanes are mixed, one block
after the other. The host does that, from the sums, which are a sixteenth of the bytes. The host also takes the last
block, whole or not.

The sums need the input as 64-bit words. Parts may lie in several places, at any alignment, so they are first copied one
behind the other on the device, a window at a time.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..kernels.cache import compiled
from ..kernels.digest import SIGNATURE, fold
from ..step.operands import OperandError

# Fewer bytes are copied to the host and digested there. It must be more than 240: xxh3 treats shorter inputs otherwise.
# Not measured on a device.
LEAST_BYTES: Final = 256 << 10
# The integers that a window's sums need take four times as much memory meanwhile. Not measured on a device.
WINDOW_BYTES: Final = 16 << 20
BLOCK_BYTES: Final = 1024
STRIPE_BYTES: Final = 64
_STRIPES: Final = BLOCK_BYTES // STRIPE_BYTES
_MASK: Final = (1 << 64) - 1
_LOW: Final = (1 << 32) - 1
_PRIMES_32: Final = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
_PRIMES_64: Final = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)
_FIRST_LANES: Final = (_PRIMES_32[2], *_PRIMES_64[:4], _PRIMES_32[1], _PRIMES_64[4], _PRIMES_32[0])
_AVALANCHE: Final = 0x165667919E3779F9
_MIX_SHIFT: Final = 47
_LAST_STRIPE_AT: Final = 7  # offset in the secret, back from its last 64 bytes
_MERGED_FROM: Final = 11
# The default secret in xxh3's definition.
SECRET: Final = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_SCRAMBLED_WITH: Final = len(SECRET) - STRIPE_BYTES


def xxh3_64(head: bytes, parts: Sequence[Tensor]) -> int:
    """The xxh3-64 digest of the host's bytes `head` followed by the bytes of `parts`.

    parts: flat uint8 tensors on one device; OperandError for others.
    """
    for part in parts:
        if part.dtype != torch.uint8 or part.dim() != 1 or part.device != parts[0].device:
            raise OperandError(
                f"a part is {part.dim()}-d {part.dtype} on {part.device}; it must be flat bytes"
            )
    size = len(head) + sum(part.numel() for part in parts)
    if size < LEAST_BYTES:
        digest = xxhash.xxh3_64(head)
        for part in parts:
            digest.update(part.cpu().numpy().data)
        return digest.intdigest()
    parts = [torch.from_numpy(np.frombuffer(head, np.uint8).copy()).to(parts[0].device), *parts]
    blocks = (size - 1) // BLOCK_BYTES
    lanes = np.array(_FIRST_LANES, np.uint64)
    scrambled_with = np.frombuffer(SECRET, np.uint64, 8, _SCRAMBLED_WITH).copy()
    kernel = compiled(fold, SIGNATURE, _MIX_SHIFT)
    window = WINDOW_BYTES // BLOCK_BYTES
    for first in range(0, blocks, window):
        count = min(window, blocks - first)
        words = _gathered(parts, first * BLOCK_BYTES, count * BLOCK_BYTES).view(torch.int64)
        sums = _block_sums(words.view(count, _STRIPES, 8))
        kernel(sums.cpu().numpy().view(np.uint64), scrambled_with, lanes)
    begin = blocks * BLOCK_BYTES
    # xxh3's last stripe is the last 64 bytes, at any alignment
    ending = _gathered(parts, begin - STRIPE_BYTES, size - begin + STRIPE_BYTES).cpu().numpy().tobytes()
    return _finished(lanes.tolist(), ending[STRIPE_BYTES:], ending[-STRIPE_BYTES:], size)


def _block_sums(words: Tensor) -> Tensor:
    """What each block adds to the lanes: (blocks, 16 stripes, 8 words) to (blocks, 8), both int64."""
    secret = np.stack([np.frombuffer(SECRET, np.int64, 8, 8 * stripe) for stripe in range(_STRIPES)])
    keys = words ^ torch.from_numpy(secret).to(words.device)
    products = (keys & _LOW) * ((keys >> 32) & _LOW)
    # each word is also added, unmixed, to its neighbour's lane
    return products.sum(1) + words.sum(1).view(-1, 4, 2).flip(2).view(-1, 8)


def _gathered(parts: Sequence[Tensor], start: int, count: int) -> Tensor:
    """A copy of bytes [start, start + count) of the parts taken as one sequence, on their device."""
    made = torch.empty(count, dtype=torch.uint8, device=parts[0].device)
    at = 0
    for part in parts:
        low, high = max(start, at), min(start + count, at + part.numel())
        if low < high:
            made[low - start : high - start].copy_(part[low - at : high - at])
        at += part.numel()
    return made


def _finished(lanes: list[int], tail: bytes, last: bytes, size: int) -> int:
    """The digest, from the lanes before the last block, that block's bytes and the input's last 64 bytes."""
    for stripe in range((len(tail) - 1) // STRIPE_BYTES):
        _accumulate(lanes, tail[stripe * STRIPE_BYTES :][:STRIPE_BYTES], 8 * stripe)
    _accumulate(lanes, last, _SCRAMBLED_WITH - _LAST_STRIPE_AT)
    total = size * _PRIMES_64[0]
    keys = struct.unpack_from("<8Q", SECRET, _MERGED_FROM)
    for pair in range(0, 8, 2):
        product = (lanes[pair] ^ keys[pair]) * (lanes[pair + 1] ^ keys[pair + 1])
        total += (product & _MASK) ^ (product >> 64)
    total &= _MASK
    total = ((total ^ (total >> 37)) * _AVALANCHE) & _MASK
    return total ^ (total >> 32)


def _accumulate(lanes: list[Any], stripe: bytes, secret_at: int) -> None:
    words, keys = struct.unpack("<8Q", stripe), struct.unpack_from("<8Q", SECRET, secret_at)
    for lane, (word, key) in enumerate(zip(words, keys, strict=True)):
        mixed = word ^ key
        lanes[lane ^ 1] = (lanes[lane ^ 1] + word) & _MASK
        lanes[lane] = (lanes[lane] + (mixed & _LOW) * (mixed >> 32)) & _MASK
