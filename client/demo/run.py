"""The demo from start to end: one server, some workers, the same training here, and the two side by side."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .data import Flights, load_flights
from .display import Display
from .errors import DemoFailed
from .model import FlightModel, flight_model, optimizers
from .picture import draw_losses
from .processes import Child, Processes, terminable
from .scores import held_out_auc
from .service import Service, start_service
from .training import Together, batch_count, train

MODEL: Final = "flights"
AUC_FLOOR: Final = 0.72
AUC_APART: Final = 0.015
SILENT_FOR_S: Final = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """What the demo found."""

    auc_remote: float
    auc_local: float
    seconds: float
    pushes: int
    """Steps that the service applied."""
    checkpoint: Path
    picture: Path

    def shortcomings(self) -> list[str]:
        """Why this result is not good enough; empty when it is."""
        short = [
            f"the held-out AUC of {where} is {auc:.4f}, below {AUC_FLOOR}"
            for where, auc in (("the service", self.auc_remote), ("the local training", self.auc_local))
            if not auc >= AUC_FLOOR
        ]
        apart = abs(self.auc_remote - self.auc_local)
        if not apart <= AUC_APART:
            short.append(f"the two AUCs are {apart:.4f} apart, more than {AUC_APART}")
        return short

    def as_json(self) -> str:
        """One line for programs."""
        return json.dumps(
            {
                "auc_remote": round(self.auc_remote, 6),
                "auc_local": round(self.auc_local, 6),
                "seconds": round(self.seconds, 3),
                "pushes": self.pushes,
                "checkpoint": str(self.checkpoint),
                "picture": str(self.picture),
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteTraining:
    """What the workers reported."""

    losses: list[float]
    """In the order of the versions that the steps made."""
    pushes: int
    staleness: float
    """The mean: how many versions had passed since the parameters that a gradient was computed on."""


def run_demo(*, out: Path, epochs: int, workers: int, wire: str, display: Display) -> DemoResult:
    """Run all of it; the output folder is what stays."""
    began = time.monotonic()
    if importlib.util.find_spec("matplotlib") is None:  # found out now, not after the training
        raise DemoFailed("the demo draws with matplotlib: pip install 'pushstep[demo]'")
    display.say("reading the flights")
    flights = load_flights()
    checkpoint, picture = out / "flights.safetensors", out / "loss.png"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as refused:
        raise DemoFailed(f"cannot make the output folder {out}: {refused}") from refused
    display.say(
        f"{len(flights.late):,} flights, {flights.late.mean():.1%} late; "
        f"{len(flights.train):,} to learn from, {len(flights.held_out):,} held out"
    )
    remote = _train_remotely(flights, checkpoint, epochs=epochs, workers=workers, wire=wire, display=display)
    auc_remote = held_out_auc(load_checkpoint(checkpoint, flights), flights)
    local_losses, auc_local = _train_here(flights, epochs=epochs, display=display)
    draw_losses(
        picture,
        remote=remote.losses,
        local=local_losses,
        caption=f"{epochs} epochs, {workers} workers: held-out AUC {auc_remote:.4f} served, {auc_local:.4f} local",
    )
    result = DemoResult(
        auc_remote=auc_remote,
        auc_local=auc_local,
        seconds=time.monotonic() - began,
        pushes=remote.pushes,
        checkpoint=checkpoint,
        picture=picture,
    )
    display.say(f"{remote.pushes} pushes applied, mean staleness {remote.staleness:.2f}")
    display.say(
        f"held-out AUC: {auc_remote:.4f} served, {auc_local:.4f} local ({result.seconds:.0f} s in all)"
    )
    display.say(f"checkpoint: {checkpoint}")
    display.say(f"picture:    {picture}")
    return result


def _train_remotely(
    flights: Flights, checkpoint: Path, *, epochs: int, workers: int, wire: str, display: Display
) -> RemoteTraining:
    """Server and workers as processes; the checkpoint is fetched while the server still runs."""
    with ExitStack() as stack:
        stack.enter_context(terminable())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pushstep-demo-")))
        processes = stack.enter_context(Processes(folder))
        display.say("starting the server")
        service = start_service(processes, folder / "data")
        display.say(f"server ready: gRPC {service.grpc}, HTTP {service.http}; starting {workers} workers")
        summaries = {
            processes.start(f"w{index}", _worker_command(service, folder, index, workers, epochs, wire)): (
                folder / f"w{index}.json"
            )
            for index in range(workers)
        }
        steps: list[dict[str, Any]] = []
        with display.progress("service", batch_count(flights, epochs)) as show:
            for step in _steps(processes, service, set(summaries)):
                steps.append(step)
                show(
                    len(steps),
                    f"loss {step['loss']:.4f}  version {step['version']}  staleness {step['staleness']}",
                )
        finished = [json.loads(path.read_text()) for path in summaries.values()]
        service.fetch_checkpoint(MODEL, checkpoint)
        service.child.stop()
    steps.sort(key=lambda step: int(step["version"]))
    return RemoteTraining(
        losses=[step["loss"] for step in steps],
        pushes=sum(summary["outcomes"].get("applied", 0) for summary in finished),
        staleness=sum(step["staleness"] for step in steps) / max(1, len(steps)),
    )


def _worker_command(
    service: Service, folder: Path, index: int, workers: int, epochs: int, wire: str
) -> list[str]:
    options = {
        "--server": service.grpc,
        "--model": MODEL,
        "--worker": f"w{index}",
        "--index": str(index),
        "--of": str(workers),
        "--epochs": str(epochs),
        "--wire": wire,
        "--out": str(folder / f"w{index}.json"),
    }
    command = [sys.executable, "-m", "pushstep.client.demo.worker"]
    return command + [word for option in options.items() for word in option]


def _steps(processes: Processes, service: Service, working: set[Child]) -> Iterator[dict[str, Any]]:
    """Each step as it is reported, until every worker has ended well."""
    heard_at = time.monotonic()
    while working:
        line = processes.next_line(timeout_s=0.5)
        if service.child.process.poll() is not None:
            raise service.child.failure("ended while the workers were training")
        if line is None:
            if time.monotonic() - heard_at > SILENT_FOR_S:
                raise next(iter(working)).failure(f"was silent for {SILENT_FOR_S:.0f} s")
            continue
        heard_at = time.monotonic()
        child, text = line
        if child not in working:
            continue
        if text is None:
            child.expect_end()
            working.remove(child)
            continue
        try:
            step: dict[str, Any] = json.loads(text)
        except ValueError:
            raise child.failure(f"printed {text!r} where a step belongs") from None
        yield step


def load_checkpoint(checkpoint: Path, flights: Flights) -> FlightModel:
    """A fresh model with the checkpoint's values, which must be exactly its parameters."""
    model = flight_model(flights)
    try:
        model.load_state_dict(load_file(checkpoint), strict=True)
    except (SafetensorError, RuntimeError) as unfit:
        raise DemoFailed(f"the checkpoint {checkpoint} does not load: {unfit}") from unfit
    return model


def _train_here(flights: Flights, *, epochs: int, display: Display) -> tuple[list[float], float]:
    """The same batches through torch's own optimizers: the losses and the held-out AUC."""
    model = flight_model(flights)
    together = Together(optimizers(model, adagrad=torch.optim.Adagrad, adadelta=torch.optim.Adadelta))
    losses: list[float] = []
    with (
        # torch's sparse Adagrad warns until somebody decides; the gradients here are autograd's own.
        torch.sparse.check_sparse_tensor_invariants(enable=False),  # type: ignore[no-untyped-call]
        display.progress("local", batch_count(flights, epochs)) as show,
    ):

        def report(step: int, loss: float) -> None:
            losses.append(loss)
            show(step, f"loss {loss:.4f}")

        train(model, together, flights, epochs=epochs, report=report)
    return losses, held_out_auc(model, flights)
