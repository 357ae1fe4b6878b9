"""What does an exchange cost: one worker pushes a gradient, the server steps, the parameters come back."""

from __future__ import annotations

from functools import partial

from . import floors
from .peer_local import Rule
from .peers import FLOAT32_BYTES, Peers, taking_part
from .pushstep_side import CASES, Case
from .rounds import Found, Measured, Plan, best, interleave
from .table import count, decided, table

# From here on only those that fit in memory together: at 64 M all of them took more than 23 GB.
LARGE_ELEMENTS = 32_000_000
LEFT_OUT_OF_LARGE = {
    *(case.name for case in CASES if case.transport == "unix" or case.wire == "float16"),
    *("rpc default", "rpc uv", "rpc shm cma", "ray actor, tensors", "socket unix"),
}


def plan(elements: int, quick: bool) -> Plan:
    """Small exchanges many at a time: one would be lost in the wake-up of an idle process."""
    if quick:
        return Plan(rounds=3, warm=1, repeats=5)
    if elements <= 100_000:
        return Plan(rounds=7, warm=20, repeats=200)
    if elements <= 2_000_000:
        return Plan(rounds=7, warm=2, repeats=10)
    return Plan(rounds=7, warm=1, repeats=2)


def exchange(peers: Peers, rule: Rule, elements: int, quick: bool) -> None:
    """Print the table of one rule and size."""
    without = LEFT_OUT_OF_LARGE if elements >= LARGE_ELEMENTS else set()
    with peers.one_worker(rule, elements, without) as sides:
        found = interleave(sides, "exchange", plan(elements, quick))
    rows = [_row(name, measured, found, rule, elements) for name, measured in found.items()]
    table(
        f"Exchange of {count(elements)} float32, {rule}, 1 worker",
        ("", "min ms", "median ms", "CPU s/GB", "times rpc's speed", "asked", "met"),
        rows,
        found.others_share,
    )


def _row(name: str, measured: Measured, found: Found, rule: Rule, elements: int) -> tuple[object, ...]:
    rpc = best(found, "rpc")
    ratio = f"{rpc.median_s / measured.median_s:.2f}" if rpc is not None else ""
    asked, met = [], []
    for floor in floors.EXCHANGE:
        other = best(found, floor.against)
        if (floor.side, floor.rule, floor.elements) == (name, rule, elements) and other is not None:
            times, said = decided(other.median_s / measured.median_s, floor.times)
            asked.append(f"{times} x {floor.against}")
            met.append(f"{said} ({other.median_s / measured.median_s:.2f})")
    return (
        name,
        f"{measured.least_s * 1e3:.2f}",
        f"{measured.median_s * 1e3:.2f}",
        f"{measured.cpu_s_per_gb(2 * FLOAT32_BYTES * elements):.2f}",
        ratio,
        ", ".join(asked),
        ", ".join(met),
    )


def in_step(peers: Peers, rule: Rule, elements: int, quick: bool) -> None:
    """Two workers, one exchange each, in rounds or as they come, against two ranks that all-reduce and step."""
    transports = [case for case in CASES if case.wire == "float32"]
    sides = (
        *(
            (case.name, partial(peers.pushstep, case, rule, elements, 2, in_rounds=in_rounds))
            for case in transports
            for in_rounds in (True, False)
        ),
        ("gloo", lambda: peers.gloo(rule, elements)),
        ("rpc uv", lambda: peers.rpc("uv", rule, elements, 2)),
    )
    with taking_part(make() for name, make in sides if peers.wants(name)) as made:
        found = interleave(made, "exchange", plan(elements, quick))
    gloo = best(found, "gloo")
    rows = []
    for name, measured in found.items():
        ratio = gloo.median_s / measured.median_s if gloo is not None else float("nan")
        asked = ("", "")
        if name == f"{Case('shm').name}, sync" and rule == "adagrad" and elements == 16_000_000:
            asked = decided(ratio, floors.SYNC_OF_GLOO)
        rows.append(
            (
                name,
                f"{measured.least_s * 1e3:.2f}",
                f"{measured.median_s * 1e3:.2f}",
                f"{measured.cpu_s_per_gb(2 * FLOAT32_BYTES * elements):.2f}",
                f"{ratio:.2f}",
                *asked,
            )
        )
    table(
        f"A round of 2 workers, {count(elements)} float32, {rule}",
        ("", "min ms", "median ms", "CPU s/GB", "times gloo's speed", "asked", "met"),
        rows,
        found.others_share,
    )
