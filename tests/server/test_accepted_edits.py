"""No sequence of edits that were accepted can make a later step fail, whatever is pushed in between."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pushstep.client import Session
from pushstep.proto.errors import PushstepError
from tests.support.servers.harness import RunningServer, running_server
from tests.support.workers.wire import created

_numbers = itertools.count()
# What a push may be answered with, since its sender or the operator has asked for it.
BY_CHOICE = {"sparse_not_supported", "norm_outlier", "quarantined", "rejected_by_hook", "nonfinite_gradient"}
VALUES = st.sampled_from(
    [0.0, -0.0, 1e-400, 5e-324, 1e-30, 1e-10, 0.1, 0.5, 0.999999, 1.0, 100.0, 3.4e38, 1e308]
)
Edit = tuple[str, str, dict[str, Any]]


def edit(method: str, path: str, **fields: Any) -> st.SearchStrategy[Edit]:
    return st.tuples(st.just(method), st.just(path), st.fixed_dictionaries({}, optional=fields))


HYPERPARAMETERS = dict.fromkeys(("lr", "lr_decay", "eps", "weight_decay", "rho"), VALUES)
FLAGS = {name: st.booleans() for name in ("maximize", "frozen")}
EDITS = st.one_of(
    edit("PATCH", "/param-groups/0", **HYPERPARAMETERS, **FLAGS),
    edit("PATCH", "/param-groups/1", **HYPERPARAMETERS, **FLAGS),
    edit("PATCH", "/gate", nonfinite=st.sampled_from(["reject", "skip", "apply"]), norm_outlier=VALUES, norm_warmup=st.just(1)),
    edit("PATCH", "/policy", policy=st.just("async"), scale=st.booleans(), max_staleness=st.sampled_from([None, 0, 2**53])),
    edit("PATCH", "/policy", policy=st.just("bounded"), bound=st.sampled_from([0, 1, 2**53])),
    edit("PATCH", "/policy", policy=st.just("sync"), reduce=st.sampled_from(["mean", "sum"]), timeout_s=st.just(0.5)),
    edit("PATCH", "/durability", level=st.sampled_from(["applied", "everysec", "durable"])),
    st.tuples(
        st.just("POST"),
        st.just("/hooks"),
        st.sampled_from(
            [
                {"name": "clip_grad_norm", "point": "step_pre", "settings": {"max_norm": 1e-30}},
                {"name": "finite_guard", "point": "step_pre"},
                {"name": "json_log", "point": "step_post"},
                {"name": "lr_scheduler", "point": "step_post", "settings": {"scheduler": "StepLR", "arguments": {"step_size": 1, "gamma": 1e-30}}},
                {"name": "lr_scheduler", "point": "step_post", "settings": {"scheduler": "ExponentialLR", "arguments": {"gamma": 1e30}}},
            ]
        ),
    ),
    st.tuples(st.just("DELETE"), st.just("/hooks/0"), st.just({})),
)  # fmt: skip
PUSHES = st.sampled_from(["dense", "sparse", "zeros", "large", "NaN"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("accepted") / "data") as server:
        yield server


def push(session: Session, kind: str) -> None:
    table: Any = np.full((5, 3), {"zeros": 0.0, "large": 1e30, "NaN": np.nan}.get(kind, 0.5), np.float32)
    if kind == "sparse":
        table = torch.sparse_coo_tensor(
            torch.tensor([[1, 1, 4]]), torch.ones(3, 3), (5, 3), check_invariants=True
        )
    try:
        session.push({"table": table, "bias": np.ones(4, np.float32)})
    except PushstepError as error:
        assert error.code in BY_CHOICE, (kind, error)


def run(server: RunningServer, steps: list[Any]) -> None:
    name = f"e{next(_numbers)}"
    session = created(server, name)
    path = f"/v1/models/{name}"
    with httpx.Client(base_url=f"http://{server.http}", timeout=30, trust_env=False) as client:
        for step in steps:
            if isinstance(step, str):
                push(session, step)
                continue
            method, where, body = step
            if method == "DELETE":
                hooks = client.get(f"{path}/hooks").json()["hooks"]
                where = f"/hooks/{hooks[0]['id']}" if hooks else "/hooks/none"
            answer = client.request(
                method, path + where, content=json.dumps(body), headers={"content-type": "application/json"}
            )
            assert answer.status_code < 500, (step, answer.text)
        for kind in ("dense", "sparse", "zeros"):
            push(session, kind)
        shown = client.get(path).json()
        assert shown["failed"] is None
        kinds = {event["kind"] for event in client.get(f"{path}/events").json()["events"]}
        assert not kinds & {"step_failed", "failed", "worker_quarantined"}
    session.close()
    assert server.rest("DELETE", path).status_code == 204


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.one_of(EDITS, PUSHES), min_size=3, max_size=10))
def test_no_accepted_edits_make_a_step_fail(served: RunningServer, steps: list[Any]) -> None:
    run(served, steps)


@pytest.mark.soak
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.one_of(EDITS, PUSHES), min_size=3, max_size=30))
def test_no_accepted_edits_make_a_step_fail_at_length(served: RunningServer, steps: list[Any]) -> None:
    """Takes at most an hour."""
    run(served, steps)
