"""`pushstep bench`: how fast steps are on a server, from here, and beside them the same steps with torch alone."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from pushstep.proto.errors import PushstepError, UnknownModel

from .access import is_url
from .door import Door, Table, operates
from .failure import words_of

if TYPE_CHECKING:
    import torch

    from ..session import Session

WARM_UP: Final = 3
LEAST_STEPS: Final = 5
_UNITS: Final = {"": 1, "K": 1_000, "M": 1_000_000, "G": 1_000_000_000}
COLUMNS: Final = ("parameters", "steps/s", "p50 ms", "p99 ms", "MB/s each way", "torch p50 ms", "times torch")


class Rule(StrEnum):
    """The optimizers."""

    ADADELTA = "adadelta"
    ADAGRAD = "adagrad"


class Wire(StrEnum):
    """What gradients travel in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"


@dataclass(frozen=True, slots=True)
class Measured:
    """The steps of one size. Bytes are those of the parameters in float32."""

    parameters: int
    bytes: int
    steps: int
    steps_per_s: float
    p50_s: float
    p99_s: float
    bytes_per_s: float
    torch_p50_s: float
    times_torch: float


def size_of(text: str) -> int:
    """A number of parameters, such as 500, 16K or 4M. BadParameter."""
    unit = text[-1:].upper() if text[-1:].upper() in _UNITS and not text[-1:].isdigit() else ""
    number = text[: len(text) - len(unit)]
    size = int(number) * _UNITS[unit] if number.isdecimal() else 0
    if not 1 <= size <= _UNITS["G"]:
        raise typer.BadParameter(
            f"{text!r} is no size: write parameters, as 1000, 64K or 16M", param_hint="--sizes"
        )
    return size


@operates
def bench(
    door: Door,
    sizes: Annotated[str, typer.Option(help="Numbers of parameters, as 1000, 64K or 16M.")] = "1K,1M,16M",
    seconds: Annotated[float, typer.Option(min=0.01, help="How long each size is measured.")] = 2.0,
    rule: Annotated[Rule, typer.Option(help="The optimizer.")] = Rule.ADAGRAD,
    wire: Annotated[
        Wire | None, typer.Option(help="What gradients travel in; the parameters' own otherwise.")
    ] = None,
    operator_token: Annotated[
        str | None,
        typer.Option(
            metavar="@FILE", help="The token to delete its models with, where --token is that of a worker."
        ),
    ] = None,
    network: Annotated[
        bool,
        typer.Option("--network", help="Send frames, also to a server on this host, with no shared memory."),
    ] = False,
) -> None:
    """Measure steps on a server: gradients there, a step, parameters back; and torch's step of the same size here.

    It makes models of its own, and deletes them. Other models are slower meanwhile.
    """
    wanted = [size_of(text.strip()) for text in sizes.split(",")]
    if is_url(door.server):
        raise typer.BadParameter("steps go to the workers' door: pass HOST:PORT", param_hint="--server")
    operator = door if operator_token is None else door.with_token(operator_token)
    measured = []
    memory = False
    with _bar(len(wanted), quiet=door.as_json) as told:
        for size in wanted:
            told(f"{size:,} parameters")
            with _model(door, operator, wire, network=network) as session:
                found, memory = _measure(session, size, rule, seconds)
            measured.append(found)
    facts = {
        "server": door.server,
        "rule": str(rule),
        "wire": str(wire or Wire.FLOAT32),
        "shared_memory": memory,
        "sizes": [asdict(each) for each in measured],
    }
    way = "shared memory" if memory else "frames"
    said = [
        f"{rule} on {door.server}, {way}, gradients in {facts['wire']}; torch: its own {rule} step on this host"
    ]
    door.show(facts, Table(COLUMNS, map(_row, measured)), said=said)


def _row(found: Measured) -> tuple[Any, ...]:
    return (
        f"{found.parameters:,}",
        f"{found.steps_per_s:,.1f}",
        f"{found.p50_s * 1e3:.3f}",
        f"{found.p99_s * 1e3:.3f}",
        f"{found.bytes_per_s / 1e6:,.0f}",
        f"{found.torch_p50_s * 1e3:.3f}",
        f"{found.times_torch:.2f}",
    )


@contextlib.contextmanager
def _model(door: Door, operator: Door, wire: Wire | None, *, network: bool) -> Iterator[Session]:
    """A session with a model of its own, which `operator` deletes behind the block."""
    from ..connection import session_at
    from ..worker.options import WorkerOptions
    from .rest import model_path

    name = f"bench-{secrets.token_hex(4)}"
    options = WorkerOptions(model=name, worker="bench", wire=wire, shared_memory=not network)
    session = session_at(door.server, door.security, options)
    try:
        with session:
            yield session
    finally:
        try:
            operator.ask("DELETE", model_path(name))
        except UnknownModel:
            pass  # it was not made
        except PushstepError as error:
            typer.echo(
                f"model {name!r} stays on the server: {words_of(error)}; then pushstep models {name} --delete",
                err=True,
            )


def _measure(session: Session, size: int, rule: Rule, seconds: float) -> tuple[Measured, bool]:
    import torch

    from pushstep.optim import Adadelta, Adagrad

    ours: Any = {Rule.ADADELTA: Adadelta, Rule.ADAGRAD: Adagrad}[rule]
    theirs: Any = {Rule.ADADELTA: torch.optim.Adadelta, Rule.ADAGRAD: torch.optim.Adagrad}[rule]
    here, there = _parameter(size), _parameter(size)
    remote = session.attach(ours([there]), names=["weight"])
    local = theirs([here])
    took = _timed(remote.step, seconds)
    alone = _timed(local.step, seconds / 4)
    p50_s, alone_s = _quantile(took, 0.5), _quantile(alone, 0.5)
    size_bytes = size * there.element_size()
    return (
        Measured(
            parameters=size,
            bytes=size_bytes,
            steps=len(took),
            steps_per_s=len(took) / sum(took),
            p50_s=p50_s,
            p99_s=_quantile(took, 0.99),
            bytes_per_s=size_bytes * len(took) / sum(took),
            torch_p50_s=alone_s,
            times_torch=p50_s / alone_s,
        ),
        session.memory.region is not None,
    )


def _parameter(size: int) -> torch.nn.Parameter:
    """A parameter and its gradient."""
    import torch

    made = torch.nn.Parameter(torch.randn(size, dtype=torch.float32, device="cpu"))
    made.grad = torch.randn(size, dtype=torch.float32, device="cpu") * 0.01
    return made


def _timed(step: Callable[[], Any], seconds: float) -> list[float]:
    """The seconds of each of many steps, as many as fit."""
    for _ in range(WARM_UP):
        step()
    took: list[float] = []
    until_s = time.perf_counter() + seconds
    while len(took) < LEAST_STEPS or took[-1] + time.perf_counter() < until_s:
        began_s = time.perf_counter()
        step()
        took.append(time.perf_counter() - began_s)
    return took


def _quantile(took: Sequence[float], share: float) -> float:
    return sorted(took)[min(int(len(took) * share), len(took) - 1)]


@contextlib.contextmanager
def _bar(sizes: int, *, quiet: bool) -> Iterator[Callable[[str], None]]:
    """What is measured now, on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

    from .rest import progress_bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with progress_bar(*columns, quiet=quiet, transient=True) as bar:
        task = bar.add_task("", total=sizes, completed=-1)

        def told(what: str) -> None:
            bar.advance(task)
            bar.update(task, description=what)

        yield told
