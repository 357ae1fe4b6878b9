"""A worker of the demo: a process that computes gradients, while the service takes the steps.

It joins a model by name, trains its share of each epoch and leaves. It prints each step as one line of JSON on stdout;
with `--out` it writes a summary at the end, if nothing failed.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from .. import TLS, connect
from .data import load_flights
from .model import flight_model, optimizers
from .training import train

# how long to wait for a server that is started at the same time
START_S: Final = 60.0


def work(
    *,
    server: str,
    model: str,
    worker: str,
    index: int,
    of: int,
    epochs: int,
    wire: str,
    policy: dict[str, Any] | None,
    token: str | None = None,
    tls: TLS | None = None,
    insecure: bool = False,
) -> dict[str, Any]:
    """Train this worker's share through the service and print each step; returns the summary."""
    flights = load_flights()
    network = flight_model(flights)
    outcomes: Counter[str] = Counter()
    staleness: list[int] = []
    secured: dict[str, Any] = {"token": token, "tls": tls, "insecure": insecure}
    session = connect(server, model=model, worker=worker, wire=wire, wait_s=START_S, **secured)
    with closing(session):
        optimizer = session.attach(optimizers(network), module=network, policy=policy)

        def report(step: int, loss: float) -> None:
            receipt = optimizer.last_receipt
            if receipt is None:  # a step without any gradient sends no push
                return
            outcomes[str(receipt.outcome)] += 1
            staleness.append(int(receipt.staleness))
            line = {
                "step": step,
                "loss": loss,
                "outcome": receipt.outcome,
                "version": receipt.version,
                "staleness": receipt.staleness,
                "contributors": len(receipt.contributors),
            }
            print(json.dumps(line), flush=True)

        train(network, optimizer, flights, epochs=epochs, report=report, index=index, of=of)
    return {
        "worker": worker,
        "steps": len(staleness),
        "outcomes": dict(outcomes),
        "staleness_mean": sum(staleness) / max(1, len(staleness)),
        "staleness_max": max(staleness, default=0),
    }


def _token(option: str) -> str:
    """The token in a file. It is no argument itself, which every user of a machine can see."""
    if not option.startswith("@"):
        raise argparse.ArgumentTypeError("pass a file, as --token @FILE, or set PUSHSTEP_TOKEN")
    return Path(option[1:]).read_text().split("\n", 1)[0].strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pushstep.client.demo.worker", description=__doc__)
    parser.add_argument("--server", required=True, help="the service's gRPC address")
    parser.add_argument(
        "--model", default="flights", help="the model to join, or to create as the first worker"
    )
    parser.add_argument("--worker", required=True, help="this worker's name")
    parser.add_argument("--index", type=int, default=0, help="which share of the batches, from 0")
    parser.add_argument("--of", type=int, default=1, help="how many shares there are")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--wire", default="float32", help="what gradients travel in")
    parser.add_argument(
        "--policy", type=json.loads, help="of the model, if this creates it: JSON as PATCH takes it"
    )
    parser.add_argument(
        "--token", type=_token, metavar="@FILE", help="the file with the token [default: PUSHSTEP_TOKEN]"
    )
    parser.add_argument(
        "--tls-ca", type=Path, help="PEM file with the CA of the server [default: PUSHSTEP_TLS_CA]"
    )
    parser.add_argument(
        "--insecure", action="store_true", help="send the token to another host without TLS, too"
    )
    parser.add_argument("--out", type=Path, help="where to write the summary, as JSON")
    given = parser.parse_args(arguments)
    summary = work(
        server=given.server,
        model=given.model,
        worker=given.worker,
        index=given.index,
        of=given.of,
        epochs=given.epochs,
        wire=given.wire,
        policy=given.policy,
        token=given.token,
        tls=None if given.tls_ca is None else TLS(ca=given.tls_ca),
        insecure=given.insecure,
    )
    if given.out is not None:
        given.out.write_text(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
