"""Threads apart by what they are for: one kind never waits for another, and who asks for too much is told so."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from pushstep.proto.errors import Busy
from pushstep.server.process import threads
from pushstep.server.process.threads import DISK, PULLS, PUSHES, READS, REQUESTS, Share, Threads


def test_a_kind_whose_threads_are_all_at_work_keeps_no_other_waiting() -> None:
    kinds = [PUSHES, REQUESTS, DISK, PULLS, READS]
    release = threading.Event()

    async def run() -> None:
        for full in kinds:
            held = [full.start(release.wait, 60) for _ in range(full.count)]
            others = [kind.run(lambda: True) for kind in kinds if kind is not full]
            assert all(await asyncio.gather(*others))
            release.set()
            await asyncio.gather(*held)
            release.clear()

    asyncio.run(asyncio.wait_for(run(), 30))


def test_beyond_those_that_may_wait_a_call_is_refused_and_costs_nothing() -> None:
    own = Threads("own", 1, most_waiting=2)
    release = threading.Event()

    async def run() -> None:
        held = [own.start(release.wait, 60) for _ in range(3)]
        with pytest.raises(Busy) as caught:
            own.start(release.wait, 60)
        assert caught.value.retry_after_s is not None
        held[-1].cancel()  # whoever goes away makes room
        await asyncio.sleep(0)
        held[-1] = own.start(release.wait, 60)
        release.set()
        await asyncio.gather(*held)

    asyncio.run(asyncio.wait_for(run(), 30))


def test_small_work_is_done_here_and_now() -> None:
    async def run() -> None:
        assert await PUSHES.run_unless(True, threading.get_ident) == threading.get_ident()
        assert await PUSHES.run_unless(False, threading.get_ident) != threading.get_ident()

    asyncio.run(run())


class Clock:
    """Time that passes when somebody works or rests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(threads.time, "monotonic", lambda: self.now_s)

    def work(self, seconds: float) -> None:
        self.now_s += seconds


def test_a_share_is_kept_in_the_long_run_and_a_burst_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    share = Share(0.25, burst_s=10.0)
    monkeypatch.setattr(share.ended, "wait", clock.work)
    for _ in range(10):
        share.run(lambda: clock.work(1.0))
    assert clock.now_s == 10.0  # nobody rested
    for _ in range(100):
        share.run(lambda: clock.work(1.0))
    assert 110 / clock.now_s == pytest.approx(0.25, abs=0.05)
    clock.work(1000.0)  # and after a while nobody rests again
    begun_s = clock.now_s
    share.run(lambda: clock.work(9.0))
    assert clock.now_s == begun_s + 9.0


def test_a_stop_ends_every_rest() -> None:
    own = Threads("own", 1, share=Share(0.001, burst_s=0.0))

    async def run() -> None:
        await own.run(time.sleep, 0.05)  # which is to be followed by a rest of 50 s
        resting = own.start(lambda: True)
        own.let_go()
        assert await resting

    asyncio.run(asyncio.wait_for(run(), 30))
