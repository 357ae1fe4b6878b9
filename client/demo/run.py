"""Runs the demo: a server with workers, the same training locally, and the comparison."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .data import Flights, load_flights
from .display import Display
from .errors import DemoFailed
from .model import FlightModel, flight_model, held_out_auc, optimizers
from .picture import draw_losses
from .processes import Processes, terminable
from .result import DemoResult, PolicyRun
from .served import Course, ServedTraining, train_served
from .service import start_service
from .training import BATCH, Together, batch_count, train

MODEL: Final = "flights"


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalTraining:
    """Losses and held-out AUC of a training on the same flights with torch's own optimizers."""

    losses: list[float]
    auc: float


def run_demo(
    *,
    out: Path,
    epochs: int,
    workers: int,
    wire: str,
    policies: Sequence[str],
    display: Display,
    shards: int = 1,
) -> DemoResult:
    """Run the whole demo. Only the output folder stays. DemoFailed if any part fails."""
    began = time.monotonic()
    if importlib.util.find_spec("matplotlib") is None:  # checked before the training, not after it
        raise DemoFailed("the demo draws with matplotlib: pip install 'pushstep[demo]'")
    display.say("reading the flights")
    flights = load_flights()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as refused:
        raise DemoFailed(f"cannot make the output folder {out}: {refused}") from refused
    display.say(
        f"{len(flights.late):,} flights, {flights.late.mean():.1%} late; "
        f"{len(flights.train):,} to learn from, {len(flights.held_out):,} held out"
    )
    courses = [
        Course(
            policy=policy,
            model=MODEL if len(policies) == 1 else f"{MODEL}-{policy}",
            epochs=epochs,
            workers=workers,
            wire=wire,
        )
        for policy in policies
    ]
    served = _train_served(flights, courses, out, display, shards)
    local = {
        batch: _train_here(flights, epochs=epochs, batch=batch, display=display)
        for batch in sorted({course.local_batch for course in courses})
    }
    runs = tuple(
        _run(course, training, local[course.local_batch], out, flights)
        for course, training in zip(courses, served, strict=True)
    )
    picture = out / "loss.png"
    _draw(picture, courses, served, local)
    result = DemoResult(runs=runs, seconds=time.monotonic() - began, picture=picture)
    _tell(result, display)
    return result


def _train_served(
    flights: Flights, courses: Sequence[Course], out: Path, display: Display, shards: int
) -> list[ServedTraining]:
    """Run the courses one after the other on one server; each checkpoint is fetched while the server runs."""
    with ExitStack() as stack:
        stack.enter_context(terminable())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pushstep-demo-")))
        processes = stack.enter_context(Processes(folder))
        how = "" if shards == 1 else f" in {shards} ranks"
        display.say(
            f"starting the server{how}; the first time it compiles its kernels, which takes up to a minute"
        )
        service = start_service(processes, folder / "data", shards)
        display.say(f"server ready: gRPC {service.grpc}, HTTP {service.http}")
        served = []
        for course in courses:
            display.say(f"{course.policy}: starting {course.workers} workers")
            served.append(train_served(processes, service, flights, course, display))
            service.fetch_checkpoint(course.model, _checkpoint(course, out))
        service.stop()
    return served


def _checkpoint(course: Course, out: Path) -> Path:
    return out / f"{course.model}.safetensors"


def _run(
    course: Course, served: ServedTraining, local: LocalTraining, out: Path, flights: Flights
) -> PolicyRun:
    checkpoint = _checkpoint(course, out)
    return PolicyRun(
        policy=course.policy,
        auc_remote=held_out_auc(load_checkpoint(checkpoint, flights), flights),
        auc_local=local.auc,
        local_batch=course.local_batch,
        pushes=served.pushes,
        pushes_per_s=served.pushes_per_s,
        staleness=served.staleness,
        contributors=served.contributors,
        checkpoint=checkpoint,
    )


def _draw(
    picture: Path,
    courses: Sequence[Course],
    served: Sequence[ServedTraining],
    local: dict[int, LocalTraining],
) -> None:
    """Draw every curve over the batches of BATCH flights seen: a step on a larger batch counts as several."""
    curves: dict[str, Sequence[float]] = {
        f"pushed to the service, {course.policy}": training.losses
        for course, training in zip(courses, served, strict=True)
    }
    for batch, training in local.items():
        curves[f"here, torch.optim, {batch} a step"] = np.repeat(training.losses, batch // BATCH).tolist()
    draw_losses(picture, curves, caption=f"{courses[0].epochs} epochs, {courses[0].workers} workers")


def _tell(result: DemoResult, display: Display) -> None:
    for run in result.runs:
        for line in run.as_lines():
            display.say(line)
    if any(run.policy == "sync" for run in result.runs):
        display.say(
            "each policy got the same flights in as many pushes; a round of sync is one step, "
            "so it stands beside local steps on as many flights"
        )
    for run in result.runs:
        display.say(f"checkpoint: {run.checkpoint}")
    display.say(f"picture:    {result.picture}")
    display.say(f"{result.seconds:.0f} s in all")


def load_checkpoint(checkpoint: Path, flights: Flights) -> FlightModel:
    """A model with the checkpoint's values. DemoFailed unless the checkpoint has exactly its parameters."""
    model = flight_model(flights)
    try:
        model.load_state_dict(load_file(checkpoint), strict=True)
    except (SafetensorError, RuntimeError) as unfit:
        raise DemoFailed(f"the checkpoint {checkpoint} does not load: {unfit}") from unfit
    return model


def _train_here(flights: Flights, *, epochs: int, batch: int, display: Display) -> LocalTraining:
    """Train on the same flights in the same order with torch's own optimizers."""
    model = flight_model(flights)
    together = Together(optimizers(model, adagrad=torch.optim.Adagrad, adadelta=torch.optim.Adadelta))
    losses: list[float] = []
    with (
        # torch warns until this is set, either way; no check is needed, since the gradients are autograd's
        torch.sparse.check_sparse_tensor_invariants(enable=False),  # type: ignore[no-untyped-call]
        display.progress(f"local, {batch} a step", batch_count(flights, epochs, batch=batch)) as show,
    ):

        def report(step: int, loss: float) -> None:
            losses.append(loss)
            show(step, f"loss {loss:.4f}")

        train(model, together, flights, epochs=epochs, batch=batch, report=report)
    return LocalTraining(losses=losses, auc=held_out_auc(model, flights))
