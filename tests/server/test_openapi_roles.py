"""schemathesis as each role, at a server that has tokens, beside a training: nothing closed is open, nothing breaks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pushstep.client import Outcome, connect
from pushstep.proto.errors import PushstepError
from pushstep.server.access.roles import Role
from tests.support.access.schema_runs import DELETE_MODEL, run_schemathesis
from tests.support.access.secured import TokenFile
from tests.support.servers.harness import RunningServer, running_server
from tests.support.servers.operators import add_hook, take_snapshot
from tests.support.workers.wire import PARAMETERS, created

MODEL, TRAINER = "m", "trainer"
ROLES = (None, *Role)


class Training:
    """A worker that pushes a hundred times a second at most, and joins again whatever an operator does to it."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._train)
        self.applied = 0
        self.refused: list[str] = []

    def _train(self) -> None:
        gradients = {name: np.full(value.shape, 1e-3, np.float32) for name, value in PARAMETERS.items()}
        while not self._ends.is_set():
            try:
                with connect(
                    self._server.grpc,
                    model=MODEL,
                    worker=TRAINER,
                    takeover=True,
                    shared_memory=False,
                    token=self._server.token,
                    timeout_s=2.0,
                    retry_for_s=2.0,
                ) as session:
                    while not self._ends.is_set():
                        self.applied += session.push(gradients).outcome is Outcome.APPLIED
                        self._ends.wait(0.01)
            except (PushstepError, Warning) as error:
                self.refused.append(repr(error))
                self._ends.wait(0.1)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """For the length of a block."""
        self._thread.start()
        try:
            yield
        finally:
            self._ends.set()
            self._thread.join()


def check(
    data: Path, roles: Sequence[Role | None], examples: int, phases: str, *, is_long: bool = False
) -> None:
    tokens = TokenFile(data.with_name("tokens"))
    with running_server(data, *tokens.options()) as server:
        server.token, server.headers = tokens.tokens["worker"], tokens.headers("operator")
        created(server, MODEL)
        names: dict[str, str | int] = {
            "m": MODEL,
            "name": "bias",
            "worker": "owner",
            "snapshot": take_snapshot(server, MODEL)["id"],
            "hook_id": add_hook(server, MODEL, "json_log", "step_post", {"every": 100})["id"],
            "index": 1,
        }
        training = Training(server)
        with training.going_on():
            for role in roles:
                headers = {} if role is None else tokens.headers(role)
                who = {"headers": headers, "role": role or ""}
                others = ("--exclude-operation-id", DELETE_MODEL)
                folder = data / f"as-{role}"
                run_schemathesis(server, folder, examples, *others, phases=phases, **who, **names)
                if is_long:  # along the links: each answer names what the next request asks for
                    folder = data / f"along-links-as-{role}"
                    run_schemathesis(server, folder, examples, *others, phases="stateful", **who, m=MODEL)
                if role is not Role.OPERATOR:  # who is not let in changes nothing, and holds nobody up
                    assert training.refused == []
                    events = server.rest("GET", f"/v1/models/{MODEL}/events").json()["events"]
                    assert not any(event["actor"].startswith(("viewer:", "local")) for event in events)
        assert training.applied > 0
        assert server.rest("GET", f"/v1/models/{MODEL}").json()["failed"] is None
        assert server.stop() == 0
        log = server.log.read_text()
        assert "internal error" not in log
        assert "Traceback" not in log


def test_no_closed_route_answers_and_each_answer_is_as_described(data: Path) -> None:
    """Each route as its example asks; also without its token, and with another."""
    check(data, [Role.VIEWER, Role.OPERATOR], 1, "examples")


@pytest.mark.soak
@pytest.mark.parametrize("role", ROLES, ids=str)
def test_no_closed_route_answers_at_length(data: Path, role: Role | None) -> None:
    """Takes at most a quarter of an hour each."""
    check(data, [role], 200, "examples,coverage,fuzzing", is_long=True)
