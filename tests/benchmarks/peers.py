"""Who takes part: each peer's processes are started when it is first needed, and all end with the block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

from .driver import Make
from .peer_gloo import Gloo
from .peer_grpc import Grpc, Way
from .peer_local import Local, Rule
from .peer_ray import FORMS, Form, Ray
from .peer_ray import installed as ray_installed
from .peer_rpc import VARIANTS, Rpc
from .peer_socket import Socket
from .pushstep_side import CASES, Case, Pushstep
from .side import Side
from .training_side import How

FLOAT32_BYTES = 4


class Peers:
    """Owns the processes of whoever was asked for.

    `only` are words of which a side's name must contain one; `device` is where this service's server holds its models.
    """

    def __init__(self, only: Sequence[str] = (), device: str = "cpu") -> None:
        self._only = only
        self._device = device
        self._stack = contextlib.ExitStack()
        self._started: dict[tuple[object, ...], Any] = {}

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wants(self, name: str) -> bool:
        """Whether a side is to take part."""
        return not self._only or any(word in name for word in self._only)

    def _peer(self, make: Callable[..., Any], *arguments: object) -> Any:
        key = (make, *arguments)
        if key not in self._started:
            self._started[key] = make(*arguments)
            self._stack.callback(self._started[key].close)
        return self._started[key]

    def pushstep(
        self, case: Case, rule: Rule, elements: int, workers: int = 1, *, in_rounds: bool = False
    ) -> Side:
        """This service."""
        return self._peer(Pushstep, 2, self._device).side(case, rule, elements, workers, in_rounds=in_rounds)

    def training(self, how: How, elements: int) -> Side:
        """This service, with a worker that trains."""
        return self._peer(Pushstep, 2).training(how, elements)

    def training_locally(self, elements: int) -> Side:
        """The same worker with torch's own optimizer."""
        return self._peer(Local).training(elements)

    def rpc(self, variant: str, rule: Rule, elements: int, workers: int = 1) -> Side:
        """torch.distributed.rpc."""
        return self._peer(Rpc, variant, min(workers, 2)).side(rule, elements, workers)

    def ray(self, form: Form, rule: Rule, elements: int) -> Side:
        """A Ray actor."""
        return self._peer(Ray).side(form, rule, elements)

    def of_pushstep(self, name: str, make: Make, transport: str, workers: int, *arguments: object) -> Side:
        """This service, with workers of another load."""
        return self._peer(Pushstep, 2, self._device).of(name, make, transport, workers, *arguments)

    def of_rpc(self, variant: str, make: Make, workers: int, *arguments: object) -> Side:
        """torch.distributed.rpc, with workers of another load."""
        return self._peer(Rpc, variant, min(workers, 2)).of(make, workers, *arguments)

    def of_ray(self, name: str, make: Make, *arguments: object) -> Side:
        """A Ray actor, with a worker of another load."""
        return self._peer(Ray).of(name, make, *arguments)

    def of_local(self, name: str, make: Make, *arguments: object) -> Side:
        """A worker alone, of another load."""
        return self._peer(Local).of(name, make, *arguments)

    def socket(self, family: str, elements: int) -> Side:
        """Bare sockets moving as many float32."""
        return self._peer(Socket, family).side(elements * FLOAT32_BYTES)

    def grpc(self, elements: int, way: Way = "calls", workers: int = 1) -> Side:
        """Bare gRPC moving as many float32."""
        return self._peer(Grpc, min(workers, 2)).side(elements * FLOAT32_BYTES, way, workers)

    def gloo(self, rule: Rule, elements: int) -> Side:
        """Two gloo ranks."""
        return self._peer(Gloo).side(rule, elements)

    @contextlib.contextmanager
    def one_worker(self, rule: Rule, elements: int, without: Collection[str] = ()) -> Iterator[list[Side]]:
        """Every side that one worker can exchange with, for the length of a block; but those named."""
        makes: dict[str, Callable[[], Side]] = {
            case.name: partial(self.pushstep, case, rule, elements) for case in CASES
        }
        makes |= {f"rpc {variant}": partial(self.rpc, variant, rule, elements) for variant in VARIANTS}
        if ray_installed():
            makes |= {f"ray actor, {form}": partial(self.ray, form, rule, elements) for form in FORMS}
        makes |= {f"socket {family}": partial(self.socket, family, elements) for family in ("tcp", "unix")}
        makes["gRPC tcp"] = partial(self.grpc, elements)
        makes["local torch.optim"] = lambda: self._peer(Local).side(rule, elements)
        wanted = [make for name, make in makes.items() if self.wants(name) and name not in without]
        with taking_part(make() for make in wanted) as sides:
            yield sides


@contextlib.contextmanager
def taking_part(sides: Iterator[Side]) -> Iterator[list[Side]]:
    """The sides for the length of a block; closed after it, also when one of them cannot be made."""
    with contextlib.ExitStack() as stack:
        made = []
        for side in sides:
            stack.callback(side.close)
            made.append(side)
        yield made
