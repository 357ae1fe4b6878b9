"""What does a whole training step cost, compute included, when its way to the server is hidden or made shorter."""

from __future__ import annotations

from functools import partial

from .peers import FLOAT32_BYTES, Peers, taking_part
from .rounds import interleave
from .table import count, table
from .training_side import HOWS
from .transport_exchange import plan


def training(peers: Peers, elements: int, quick: bool) -> None:
    """Print the table of one size."""
    sides = (
        *((f"pushstep tcp {how.name}", partial(peers.training, how, elements)) for how in HOWS),
        ("local torch.optim", partial(peers.training_locally, elements)),
    )
    with taking_part(make() for name, make in sides if peers.wants(name)) as made:
        found = interleave(made, "train", plan(elements, quick))
        alone = interleave(made[-1:], "compute", plan(elements, quick))
    first = next(iter(found.values()))
    rows = [
        (
            name,
            f"{measured.least_s * 1e3:.2f}",
            f"{measured.median_s * 1e3:.2f}",
            f"{measured.cpu_s_per_gb(2 * FLOAT32_BYTES * elements):.2f}",
            f"{first.median_s / measured.median_s:.2f}",
        )
        for name, measured in [*found.items(), *((f"{name}, no step", m) for name, m in alone.items())]
    ]
    table(
        f"A training step of a model of {count(elements)} float32, Adagrad, 1 worker",
        ("", "min ms", "median ms", "CPU s/GB", "times the first's speed"),
        rows,
        found.others_share,
    )
