"""A process of many sessions on a bad network, for test_exactly_once.py: it may be killed at any moment and started again.

    faulty_worker.py ADDRESS MODEL FIRST SESSIONS PUSHES DIARY SEED

What each session tries and is told goes into the diary before anything else happens, so that the next process under
the same names knows which push is in doubt; the receipts that its join brings say what became of it. Faults happen
between the session and its channel, push by push: a reply is lost, a push is sent twice, again much later, or broken
off on its way. A receipt that comes again must be the one that came first.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pushstep.client import Receipt, Session, connect
from pushstep.client.transport.channel import Transport
from pushstep.client.transport.progress import Watchdog
from pushstep.client.transport.retry import TransportFailure, answered
from pushstep.client.transport.step_call import StepCalls
from pushstep.client.transport.streams import Body
from pushstep.proto.errors import PushstepError
from pushstep.proto.training_pb2 import PushCommit, PushHeader
from pushstep.proto.types_pb2 import Receipt as WireReceipt

LOST_REPLIES = 0.10
TWICE = 0.03
MUCH_LATER = 0.03
BROKEN_OFF = 0.02
# an element that all share, so that the order shows in the parameters; the others belong to one session each
SHARED = 1
# a step, and the epoch and sequence under which it was pushed
Tried = tuple[int, int, int]


def gradient(session: int, number: int, sessions: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What a session pushes at its step `number`."""
    grads = np.zeros(SHARED + sessions, np.float32)
    grads[0] = 1 + (31 * session + number) % 5
    grads[SHARED + session] = 1 + number % 3
    return grads


class Diary:
    """One line per event, whole or not at all: a kill may come between any two."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, *words: object) -> None:
        os.write(self._file, (" ".join(map(str, words)) + "\n").encode())


class Faults:
    """Put in place of Transport.push."""

    def __init__(self, diary: Diary, seed: int) -> None:
        self._diary = diary
        self._chance = random.Random(seed)
        self._push = Transport.push
        self._later = ThreadPoolExecutor(4)
        # by worker: its index, and the step that it is at
        self.trying: dict[str, tuple[int, int]] = {}
        Transport.push = lambda transport, header, body, commit: self.push(transport, header, body, commit)  # type: ignore[method-assign]

    def push(self, transport: Transport, header: PushHeader, body: Body, commit: PushCommit) -> WireReceipt:
        """One attempt, with what may happen to it. A session that joins anew in between tries under another identity."""
        identity = header.identity
        self._diary.write("try", *self.trying[identity.worker], identity.epoch, identity.sequence)
        drawn = self._chance.random()
        if drawn < BROKEN_OFF:
            self._diary.write("fault", "broken_off")
            return self._break_off(transport, header, body, commit)
        answer = self._push(transport, header, body, commit)
        drawn -= BROKEN_OFF
        if drawn < LOST_REPLIES:
            self._diary.write("fault", "lost_reply")
            raise TransportFailure("lost on purpose")
        drawn -= LOST_REPLIES
        if drawn < TWICE:
            self._diary.write("fault", "sent_twice")
            self._again(0.0, transport, header, body, commit, answer)
        elif drawn < TWICE + MUCH_LATER:
            self._diary.write("fault", "sent_much_later")
            late = PushHeader()
            late.CopyFrom(header)
            delay_s = self._chance.uniform(0.0, 0.1)
            self._later.submit(self._again, delay_s, transport, late, body, commit, answer)
        return answer

    def _break_off(
        self, transport: Transport, header: PushHeader, body: Body, commit: PushCommit
    ) -> WireReceipt:
        """The client gives up at some moment of the call; whether the server had taken it, it does not know."""
        hurried = _Hurried(transport, self._chance.uniform(0.0002, 0.003))
        return self._push(hurried, header, body, commit)

    def _again(self, delay_s: float, transport: Transport, *sent: Any) -> None:
        *request, first = sent
        time.sleep(delay_s)
        try:
            second = answered(lambda: self._push(transport, *request))
        except (PushstepError, TransportFailure, ValueError) as error:  # too old, or the channel is closed
            self._diary.write("again", type(error).__name__)
            return
        for answer in (first, second):
            answer.duplicates = 0
        if second != first:
            self._diary.write(
                "bad", "another receipt", str(first).replace("\n", ","), str(second).replace("\n", ",")
            )


class _Hurried(Transport):
    """A transport that waits for less time."""

    def __init__(self, transport: Transport, timeout_s: float) -> None:
        self.__dict__.update(vars(transport))
        self.timeout_s = timeout_s
        self.watchdog = Watchdog(timeout_s)
        self._steps = StepCalls(partial(self._call, "TakeSteps"), self.watchdog)


class Worker:
    """One session's training."""

    def __init__(
        self, diary: Diary, faults: Faults, address: str, model: str, index: int, sessions: int, pushes: int
    ) -> None:
        self.diary = diary
        self.faults = faults
        self.address = address
        self.model = model
        self.index = index
        self.sessions = sessions
        self.pushes = pushes

    def run(self, told: int, tried: set[Tried]) -> None:
        """Go on after step `told`; `tried`: under which identities earlier processes may have pushed which step."""
        name = f"w{self.index}"
        # an attempt outlasts a restart of the server: a process may begin in the middle of one
        with connect(
            self.address, model=self.model, worker=name, timeout_s=60, shared_memory=False
        ) as session:
            session.create(*model_of(self.sessions))
            doubted = {one for one in tried if one[0] == told + 1}
            if doubted and self._settle(session, doubted):
                told += 1
            for number in range(told + 1, self.pushes + 1):
                self.faults.trying[name] = self.index, number
                grads = gradient(self.index, number, self.sessions)
                self._told(number, session.push({"p": grads}))

    def _settle(self, session: Session, doubted: set[Tried]) -> bool:
        """Whether the push in doubt had been decided."""
        identity = session.member().identity()
        found = []
        for number, identity.epoch, identity.sequence in sorted(doubted):
            receipt = session.member().receipt_of(identity)
            if receipt is not None:
                found.append((number, receipt))
        self.diary.write("doubt", "applied" if found else "not_applied")
        for number, receipt in found:
            self._told(number, receipt)
        return bool(found)

    def _told(self, number: int, receipt: Receipt) -> None:
        self.diary.write("told", self.index, number, receipt.timeline, receipt.version, receipt.outcome)


def model_of(sessions: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What Session.create takes."""
    return {"p": np.zeros(SHARED + sessions, np.float32)}, [{"rule": "adagrad", "params": ["p"], "lr": 0.125}]


def read(diary: Path) -> tuple[dict[int, int], dict[int, set[Tried]]]:
    """Of each session: the last step that it was told of, and what it tried."""
    told: dict[int, int] = {}
    tried: dict[int, set[Tried]] = {}
    lines = diary.read_text().splitlines() if diary.exists() else []
    for line in lines:
        kind, *words = line.split()
        if kind == "told":
            told[int(words[0])] = int(words[1])
        elif kind == "try":
            tried.setdefault(int(words[0]), set()).add((int(words[1]), int(words[2]), int(words[3])))
    return told, tried


def main(
    address: str, model: str, first: int, mine: int, sessions: int, pushes: int, diary: Path, seed: int
) -> None:
    """Run sessions `first` to `first + mine` of them all."""
    torch.set_num_threads(1)
    told, tried = read(diary)
    book = Diary(diary)
    faults = Faults(book, seed)
    failed: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            book.write("bad", type(error).__name__, str(error).replace("\n", " "))
            failed.append(error)
            raise

    threads = []
    for index in range(first, first + mine):
        worker = Worker(book, faults, address, model, index, sessions, pushes)
        work = lambda worker=worker, index=index: worker.run(told.get(index, 0), tried.get(index, set()))  # noqa: E731
        threads.append(threading.Thread(target=guarded, args=(work,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.exit(bool(failed))


if __name__ == "__main__":
    address, model, *numbers, diary, seed = sys.argv[1:]
    main(address, model, *map(int, numbers), Path(diary), int(seed))  # type: ignore[call-arg, arg-type]
