"""Lists of tensors: 1,000 and 20,000 of 8 elements, ResNet-50 and BERT-base, against torch's local foreach step.

"step" is zero_grad, the assignment of gradients that are there already, and the step; "iteration" has autograd accumulate the
gradients instead, with its hooks.
"""

from __future__ import annotations

import signal

import torch

from . import floors, tensor_lists
from .peer_local import Rule
from .peers import Peers, taking_part
from .rounds import Found, Plan, interleave
from .table import decided, table
from .transport import end_orderly

RULES: tuple[Rule, ...] = ("adadelta", "adagrad")
QUICK = ("1,000 of 8",)


def main(quick: bool = False) -> None:
    """Print the tables."""
    signal.signal(signal.SIGTERM, end_orderly)
    print(f"\n## tensors: torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in QUICK if quick else tensor_lists.LISTS:
        for rule in RULES:
            with Peers() as peers:
                _compare(peers, name, rule, quick)


def _compare(peers: Peers, name: str, rule: Rule, quick: bool) -> None:
    plan = Plan(rounds=2, warm=1, repeats=2) if quick else Plan(rounds=7, warm=2, repeats=5)
    makes = [
        lambda transport=transport: peers.of_pushstep(  # type: ignore[misc]
            f"pushstep {transport}", tensor_lists.remote, transport, 1, name, rule, transport == "shm"
        )
        for transport in ("shm", "tcp")
    ]
    makes.append(lambda: peers.of_local("local torch.optim", tensor_lists.local, name, rule))
    with taking_part(make() for make in makes) as sides:
        steps = interleave(sides, "step", plan)
        iterations = interleave(sides, "iteration", plan)
    count = len(tensor_lists.LISTS[name])
    table(
        f"A step of {name}, {rule}",
        (
            "",
            "step ms, min",
            "median",
            "times local speed",
            "asked",
            "met",
            "iteration ms",
            "times local speed",
            "worker's CPU us per tensor",
            "server's",
        ),
        [_row(side, name, count, steps, iterations) for side in steps],
        max(steps.others_share, iterations.others_share),
    )


def _row(side: str, name: str, count: int, steps: Found, iterations: Found) -> tuple[object, ...]:
    mine, local = steps[side], steps["local torch.optim"]
    ratio = local.median_s / mine.median_s
    asked = ("", "")
    if side == "pushstep shm" and count in floors.TENSORS_OF_LOCAL:
        asked = decided(ratio, floors.TENSORS_OF_LOCAL[count])
    elif side == "pushstep shm" and count < 1_000:
        asked = decided(ratio, floors.MODELS_OF_LOCAL)
    both = sorted(zip(mine.cpu_s, mine.servers_cpu_s, strict=True))[len(mine.cpu_s) // 2]
    return (
        side,
        f"{mine.least_s * 1e3:.2f}",
        f"{mine.median_s * 1e3:.2f}",
        f"{ratio:.2f}",
        *asked,
        f"{iterations[side].median_s * 1e3:.2f}",
        f"{iterations['local torch.optim'].median_s / iterations[side].median_s:.2f}",
        f"{(both[0] - both[1]) / count * 1e6:.2f}",
        f"{both[1] / count * 1e6:.2f}",
    )
