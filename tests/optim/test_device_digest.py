"""Digests of bytes on a device are xxhash's own of the same bytes, however they are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import xxhash

from pushstep.optim.ops import digest as device_digest
from pushstep.optim.ops.digest import BLOCK_BYTES, LEAST_BYTES, STRIPE_BYTES, WINDOW_BYTES, xxh3_64

# around every border that the algorithm has: blocks, the stripes of the last one, windows
SIZES = [
    *(BLOCK_BYTES * blocks + more for blocks in (1, 2, 9) for more in (-1, 0, 1, 63, 64, 65, 1000)),
    *(241, 8192, 8193, 100_003),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    return str(request.param)


def check(size: int, device: str, cuts: list[int]) -> None:
    whole = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    on_device = whole.to(device)
    borders = [cuts[0], *cuts, size]
    parts = [on_device[a:b] for a, b in pairwise(borders)]
    expected = xxhash.xxh3_64(whole.numpy().data).intdigest()
    assert xxh3_64(whole[: cuts[0]].numpy().tobytes(), parts) == expected


@pytest.mark.parametrize("size", SIZES)
def test_it_is_xxhashs(device: str, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(device_digest, "LEAST_BYTES", 241)
    monkeypatch.setattr(device_digest, "WINDOW_BYTES", 8 * BLOCK_BYTES)
    check(size, device, [32, 32, size // 3, size // 2 + 1])
    check(size, device, [0, STRIPE_BYTES])


def test_of_bytes_that_fill_more_than_a_window(device: str) -> None:
    check(WINDOW_BYTES + LEAST_BYTES + 77, device, [64, 5_000_001])


def test_of_what_goes_to_the_host(device: str) -> None:
    for size in (64, 1000, LEAST_BYTES - 1):
        check(size, device, [32, 45])
    assert xxh3_64(b"abc", []) == xxhash.xxh3_64(b"abc").intdigest()
