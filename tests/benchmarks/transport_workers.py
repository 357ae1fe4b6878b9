"""What happens when there are many workers, and when some only pull."""

from __future__ import annotations

import statistics
import threading
import time

from . import floors
from .machine import Others
from .peers import FLOAT32_BYTES, Peers, taking_part
from .pushstep_side import CASES, Case
from .rounds import PAUSE_S, Plan, interleave
from .side import Side
from .table import count, decided, table

WORKERS = (1, 2, 4, 16)
MANY_BYTES = 4 << 30  # of parameters, gradients and frames of all workers together


def _float32_cases() -> list[Case]:
    return [case for case in CASES if case.wire == "float32" and case.transport != "unix"]


def crowds(peers: Peers, elements: int, quick: bool) -> None:
    """Pushes and exchanges per second of 1 to 16 workers, held by at most two processes."""
    plan = Plan(rounds=2 if quick else 3, seconds=0.2 if quick else 0.7)
    makes = [
        (f"{case.name}", lambda case=case, n=n: peers.pushstep(case, "adagrad", elements, n), n)
        for case in _float32_cases()
        for n in WORKERS
        if n * elements * 8 * FLOAT32_BYTES <= MANY_BYTES
    ]
    makes += [("rpc uv", lambda n=n: peers.rpc("uv", "adagrad", elements, n), n) for n in WORKERS[:2]]

    def sides():  # type: ignore[no-untyped-def]
        for name, make, n in makes:
            if peers.wants(name):
                side = make()
                side.name = f"{name}, {n}"
                yield side

    with taking_part(sides()) as made:
        pushes = interleave(made, "push", plan)
        exchanges = interleave(made, "exchange", plan)
    rows = []
    for name in pushes:
        one = f"{name.rpartition(',')[0]}, 1"
        ratios = [found[name].rate / found[one].rate for found in (pushes, exchanges)]
        judged = name.startswith("pushstep") and name != one
        rows.append(
            (name, f"{pushes[name].rate:.1f}", f"{ratios[0]:.2f}")
            + (decided(ratios[0], floors.CROWD_OF_ONE) if judged and name.endswith("16") else ("", ""))
            + (f"{exchanges[name].rate:.1f}", f"{ratios[1]:.2f}")
            + (f"{exchanges[name].cpu_s_per_gb(2 * FLOAT32_BYTES * elements):.2f}",)
        )
    table(
        f"Many workers, {count(elements)} float32, Adagrad, async",
        ("side, workers", "pushes/s", "of one's", "asked", "met", "exchanges/s", "of one's", "CPU s/GB"),
        rows,
        max(pushes.others_share, exchanges.others_share),
    )


def pulls(peers: Peers, elements: int, quick: bool) -> None:
    """Push rate of one worker alone, beside a reader that pulls now and then, and beside one that never rests."""
    rounds, seconds = (2, 0.2) if quick else (5, 1.0)
    rows, others_share = [], 0.0
    for case in _float32_cases():
        if not peers.wants(case.name):
            continue
        with taking_part(iter([peers.pushstep(case, "adagrad", elements, 2)])) as (both,):
            pusher = Side(case.name, both.crews[:1], both.servers)
            reader = Side("reader", both.crews[1:], both.servers)
            rates: dict[str, list[tuple[float, float]]] = {"": [], "pull_sometimes": [], "pull": []}
            for side, task in ((pusher, "push"), (reader, "pull")):
                side.turn(task, 0, 2)
            others = Others()  # of now, when all of ours have started
            for _ in range(rounds):
                for task, measured in rates.items():
                    time.sleep(PAUSE_S)
                    measured.append(_together(pusher, reader, task, seconds))
            others_share = max(others_share, others.share())
        alone = statistics.median(rate for rate, _ in rates[""])
        for task, words in (
            ("", "alone"),
            ("pull_sometimes", "a pull every 0.5 s"),
            ("pull", "pulls without rest"),
        ):
            rate = statistics.median(rate for rate, _ in rates[task])
            read = statistics.median(pulled for _, pulled in rates[task])
            asked = decided(rate / alone, floors.PUSHES_BESIDE_PULLS) if task else ("", "")
            rows.append(
                (f"{case.name}, {words}", f"{rate:.1f}", f"{read:.1f}", f"{rate / alone:.2f}", *asked)
            )
    table(
        f"Pushes of {count(elements)} float32, Adagrad, beside pulls",
        ("", "pushes/s", "pulls/s", "of those alone", "asked", "met"),
        rows,
        others_share,
    )


def _together(pusher: Side, reader: Side, task: str, seconds: float) -> tuple[float, float]:
    """(pushes, pulls) per second while both are at it."""
    if not task:
        turn = pusher.turn("push", 0, 1, seconds)
        return turn.count / turn.wall_s, 0.0
    read: list[float] = []

    def pull() -> None:
        turn = reader.turn(task, 0, 1, seconds)
        read.append(turn.count / max(turn.wall_s, seconds))

    thread = threading.Thread(target=pull)
    thread.start()
    turn = pusher.turn("push", 0, 1, seconds)
    thread.join()
    return turn.count / turn.wall_s, read[0]
