"""A worker in a process of its own that a test kills, stops and lets go on. Each of its pushes has an element of its own.

What it tries and what it is told goes into a diary before anything else happens. Forked from a server that has torch
imported, it is there in a tenth of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from pushstep.client import connect
from pushstep.proto.errors import FateUnknown, Fenced

# of one process; then it leaves
MOST_PUSHES = 80
SHARED = 1
LONGEST_THOUGHT_S = 0.02
# A third of it is how long a push waits for its round before its worker is told so, and has to ask again.
TIMEOUT_S = 3.0


def model_of(processes: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What Session.create takes: an element that all share, then those of each process."""
    start = np.zeros(SHARED + processes * MOST_PUSHES, np.float32)
    return {"p": start}, [{"rule": "adagrad", "params": ["p"], "lr": 0.0}]


@dataclass(frozen=True)
class Told:
    """What became of one push; None for an outcome: it was tried, and nobody told."""

    outcome: str | None
    version: int = 0
    contributors: tuple[str, ...] = ()


class Victim:
    """Owns one process. `number` is among all of its model, so that no two share elements."""

    def __init__(
        self, address: str, model: str, name: str, number: int, processes: int, folder: Path, *options: str
    ) -> None:
        """`options`: "takeover" joins under a live name; "asked" pushes when told to, and not by itself."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", "torch", "pushstep.client"])
        self.name = name
        self.number = number
        self._diary = folder / f"diary-{number}"
        self._pipe, theirs = context.Pipe()
        arguments = (address, model, name, number, processes, self._diary, theirs, options)
        self._process = context.Process(target=_work, args=arguments, daemon=True)
        self._settled_before = 0
        self._process.start()
        theirs.close()

    def strike(self, blow: signal.Signals) -> None:
        """Send it a signal."""
        self._settled_before = self.settled()
        os.kill(self._process.pid or 0, blow)
        if blow is signal.SIGKILL:
            self._process.join()

    def push(self) -> None:
        """Have it push once."""
        self._pipe.send(None)

    def told(self) -> dict[int, Told]:
        """By element, what it knows of its pushes."""
        found: dict[int, Told] = {}
        lines = self._diary.read_text().splitlines() if self._diary.exists() else []
        for line in lines:
            element, *words = line.split()
            outcome, version, contributors = words or (None, 0, "")
            found[int(element)] = Told(outcome, int(version), tuple(str(contributors).split("+")))
        return found

    def settled(self) -> int:
        """How many of its pushes have been answered."""
        return sum(told.outcome is not None for told in self.told().values())

    def is_pushing(self) -> bool:
        """Whether it has been answered twice since it came or went on, or has nothing more to push."""
        settled = self.settled()
        return settled >= min(self._settled_before + 2, MOST_PUSHES)

    def is_alive(self) -> bool:
        """Whether its process runs, or could."""
        return self._process.is_alive()

    def end(self) -> None:
        """End it, whatever state it is in."""
        if self.is_alive():
            self._process.kill()
        self._process.join()
        self._pipe.close()


def _work(
    address: str,
    model: str,
    name: str,
    number: int,
    processes: int,
    diary: Path,
    asked: Connection,
    options: tuple[str, ...],
) -> None:
    warnings.simplefilter("ignore")
    book = os.open(diary, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    chance = random.Random(number)
    values, groups = model_of(processes)
    with connect(
        address,
        model=model,
        worker=name,
        timeout_s=TIMEOUT_S,
        retry_for_s=60,
        shared_memory=False,
        takeover="takeover" in options,
    ) as session:
        session.create(values, groups)
        session.pull()
        for element in range(SHARED + number * MOST_PUSHES, SHARED + (number + 1) * MOST_PUSHES):
            grads = np.zeros_like(values["p"])
            grads[0] = grads[element] = 1
            if "asked" in options:
                asked.recv()
            else:
                time.sleep(chance.uniform(0, LONGEST_THOUGHT_S))
            os.write(book, f"{element}\n".encode())
            try:
                receipt, _ = session.exchange({"p": grads})
            except (Fenced, FateUnknown):
                os.write(book, f"{element} fenced 0 -\n".encode())
                return
            contributors = "+".join(receipt.contributors) or "-"
            os.write(book, f"{element} {receipt.outcome} {receipt.version} {contributors}\n".encode())
    signal.pause()
