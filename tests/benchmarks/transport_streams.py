"""How fast do frames stream in one direction, beside a bare socket that moves as many bytes."""

from __future__ import annotations

from . import floors
from .peers import FLOAT32_BYTES, Peers, taking_part
from .pushstep_side import CASES
from .rounds import best, interleave
from .table import count, decided, table
from .transport_exchange import plan


def streams(peers: Peers, elements: int, quick: bool) -> None:
    """Print a table for pushes (which are stepped, too) and one for pulls."""
    cases = [case for case in CASES if case.wire in ("float32", "bfloat16")]
    sides = (
        *((case.name, lambda case=case: peers.pushstep(case, "adagrad", elements)) for case in cases),
        *(
            (f"socket {family}", lambda family=family: peers.socket(family, elements))
            for family in ("tcp", "unix")
        ),
        ("gRPC tcp", lambda: peers.grpc(elements)),
    )
    with taking_part(make() for name, make in sides if peers.wants(name)) as made:
        for task in ("push", "pull"):
            found = interleave(made, task, plan(elements, quick))
            rows = []
            for name, measured in found.items():
                payload = elements * (2 if name.endswith("bfloat16") else FLOAT32_BYTES)
                socket = best(found, f"socket {'tcp' if ' tcp' in name else 'unix'}")
                ratio = float("nan")
                if socket is not None:
                    speed = elements * FLOAT32_BYTES / socket.median_s
                    ratio = payload / measured.median_s / speed
                asked = ("", "")
                if name == "pushstep tcp float32" and elements == 16_000_000:
                    asked = decided(ratio, floors.STREAM_OF_SOCKET)
                rows.append(
                    (
                        name,
                        f"{measured.least_s * 1e3:.2f}",
                        f"{measured.median_s * 1e3:.2f}",
                        f"{payload / measured.median_s / 1e9:.2f}",
                        f"{measured.cpu_s_per_gb(payload):.2f}",
                        f"{ratio:.2f}",
                        *asked,
                    )
                )
            table(
                f"{task.capitalize()} of {count(elements)} parameters, 1 worker, Adagrad",
                (
                    "",
                    "min ms",
                    "median ms",
                    "GB/s sent",
                    "CPU s/GB sent",
                    "of its socket's speed",
                    "asked",
                    "met",
                ),
                rows,
                found.others_share,
            )
