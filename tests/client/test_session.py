"""A session by itself: numpy in and out, readers, wire dtypes, and how a session and its model come to an end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pushstep.client import Outcome, Session
from pushstep.optim import Adadelta, Adagrad
from pushstep.proto.errors import (
    InvalidManifest,
    NonfiniteGradient,
    NotAttached,
    RowOutOfRange,
    TooLong,
    UnknownModel,
    UnknownParameter,
    WrongDtype,
    WrongShape,
)
from tests.support.servers.harness import RunningServer
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import adagrad, backward

Arrays = dict[str, np.ndarray[Any, Any]]
GROUPS = [
    {"rule": "adagrad", "params": ["table"], "lr": 0.5},
    {"rule": "adadelta", "params": ["weight", "bias"], "lr": 0.5, "rho": 0.8},
]


def values() -> Arrays:
    """Three parameters whose values, and those of `grads`, are exact in bfloat16."""
    return {
        "table": np.arange(12, dtype=np.float32).reshape(4, 3),
        "weight": np.full((2, 3), 0.5, dtype=np.float32),
        "bias": np.float32([1.0, -1.0, 2.0]),
    }


def grads(factor: float = 1.0) -> Arrays:
    """A gradient for each."""
    return {
        "table": np.full((4, 3), 0.5 * factor, dtype=np.float32),
        "weight": np.arange(6, dtype=np.float32).reshape(2, 3) * factor,
        "bias": np.float32([0.25, 2.0, -4.0]) * factor,
    }


def local(steps: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The same pushes, stepped here."""
    tensors = {name: torch.nn.Parameter(torch.from_numpy(value.copy())) for name, value in values().items()}
    optimizers = [
        Adagrad([tensors["table"]], lr=0.5),
        Adadelta([tensors["weight"], tensors["bias"]], lr=0.5, rho=0.8),
    ]
    for step in steps:
        for name, tensor in tensors.items():
            tensor.grad = None if name not in step else torch.as_tensor(step[name])
        for optimizer in optimizers:
            optimizer.step()
    return {name: tensor.detach() for name, tensor in tensors.items()}


def check(got: Arrays, expected: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert np.array_equal(got[name], tensor.numpy()), name


@pytest.fixture
def session(server: RunningServer, model_name: str) -> Session:
    """A worker of a model of three arrays."""
    made = server.connect(model_name)
    made.create(values(), GROUPS)
    return made


# --- numpy in and out


def test_push_and_pull(session: Session) -> None:
    pushed = [grads(), {"bias": grads()["bias"]}, grads(-2.0)]
    for version, step in enumerate(pushed, 1):
        receipt = session.push(step)
        assert (receipt.outcome, receipt.version, receipt.sequence) == (Outcome.APPLIED, version, version)
        assert session.last_receipt == receipt
    check(session.pull(), local(pushed))
    assert session.version == 3
    norm = np.sqrt(sum(float(np.square(value.astype(np.float64)).sum()) for value in grads(-2.0).values()))
    assert receipt.gradient_norm == pytest.approx(norm, rel=1e-12)
    assert receipt.effective_lr == [0.5, 0.5]
    assert receipt.groups[1]["rho"] == 0.8


def test_exchange(session: Session) -> None:
    steps = [grads(factor) for factor in (1.0, 0.5, -1.0)]
    for count, step in enumerate(steps, 1):
        receipt, got = session.exchange(step, metrics={"loss": 1.5})
        assert receipt.version == session.version == count
        assert receipt.staleness == 0
        check(got, local(steps[:count]))


def test_what_is_handed_out_is_the_caller_s(session: Session) -> None:
    pulled = session.pull()
    pulled["weight"][:] = 9.0
    check(session.pull(), local([]))


@pytest.mark.parametrize("form", ["pair", "sparse tensor"])
def test_row_sparse_gradients(session: Session, form: str) -> None:
    ids, rows = np.array([2, 0, 2]), np.float32([[1, 2, 3], [4, 5, 6], [0.5, 0.5, 0.5]])
    sparse = torch.sparse_coo_tensor(
        torch.from_numpy(ids)[None], torch.from_numpy(rows), (4, 3), check_invariants=True
    )
    expected = local([{"table": sparse}, {"table": sparse}])
    for _ in range(2):
        receipt, got = session.exchange({"table": (ids, rows) if form == "pair" else sparse})
    assert receipt.version == 2
    check(got, expected)


def test_a_pull_brings_only_the_rows_that_changed(session: Session) -> None:
    for changed in ([2], [0, 2], [1]):
        whole = session._worker.pull_message(None).header
        session.push({"table": (np.array(changed), np.ones((len(changed), 3), np.float32))})
        pulled = session._worker.pull_message((whole.timeline, whole.version))
        assert pulled.header.version == whole.version + 1
        ((slot, ids, rows),) = pulled.rows()
        assert (slot.name, ids.tolist()) == ("table", changed)
        assert np.array_equal(rows.numpy(), session.pull_rows("table", changed))
        assert "table" not in {dense.name for dense, _, _ in pulled.dense()}
    have = pulled.header
    again = session._worker.pull_message((have.timeline, have.version)).header
    assert again.unchanged
    assert not again.segments


def test_pull_rows(session: Session) -> None:
    table = values()["table"]
    for ids in ([3], [0, 3, 1], [2, 2], []):
        got = session.pull_rows("table", ids)
        assert got.shape == (len(ids), 3)
        assert np.array_equal(got, table[ids])
    assert session.pull_rows("bias", np.array([1])).tolist() == [-1.0]
    with pytest.raises(RowOutOfRange, match=r"row 4 of 'table'.*4 rows"):
        session.pull_rows("table", [1, 4])
    with pytest.raises(UnknownParameter, match="'tables'"):
        session.pull_rows("tables", [1])


def test_upload_is_a_version_of_its_own(session: Session, server: RunningServer) -> None:
    reader = server.connect(session.model, "reader")
    reader.pull()
    assert session.upload({"bias": np.float32([7, 8, 9])}) == 1
    assert session.push(grads()).version == 2
    with pytest.raises(NotAttached, match=r"pass values="):
        session.upload()
    with pytest.raises(WrongShape, match="'bias'"):
        session.upload({"bias": np.zeros(4, dtype=np.float32)})
    assert reader.pull()["bias"].tolist() != [7, 8, 9]
    assert session.pull_state().header.version == 2


@pytest.mark.parametrize(
    ("gradient", "error", "match"),
    [
        ({"bias": np.zeros(4, np.float32)}, WrongShape, r"'bias' has shape \(4,\), expected \(3,\)"),
        ({"bias": np.zeros(3, np.int64)}, WrongDtype, "'bias' has dtype torch.int64"),
        ({"nobody": np.zeros(3, np.float32)}, UnknownParameter, "'nobody'"),
        ({}, NotAttached, "at least one gradient"),
        (
            {"table": (np.zeros(2, np.float32), np.zeros((2, 3), np.float32))},
            WrongDtype,
            "row ids of 'table'",
        ),
        ({"table": (np.zeros(2, np.int64), np.zeros((2, 2), np.float32))}, WrongShape, "rows of 'table'"),
        ({"table": (np.array([4]), np.zeros((1, 3), np.float32))}, RowOutOfRange, "row 4"),
        ({"bias": np.float32([np.nan, 0, 0])}, NonfiniteGradient, "'bias' holds NaN"),
    ],
)
def test_bad_gradients_have_names(
    session: Session, gradient: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        session.push(gradient)
    assert session.push(grads()).version == 1
    check(session.pull(), local([grads()]))


def test_create_joins_what_exists(session: Session, server: RunningServer) -> None:
    session.push(grads())
    second = server.connect(session.model, "w1")
    second.create({name: np.zeros_like(value) for name, value in values().items()}, GROUPS)
    check(second.pull(), local([grads()]))
    assert second.push(grads()).version == 2


def test_a_session_joins_by_its_first_push(session: Session, server: RunningServer) -> None:
    second = server.connect(session.model, "w1")
    assert "reader" in repr(second)
    assert second.push(grads()).version == 1
    assert "epoch 1" in repr(second)


def test_a_model_that_does_not_exist(server: RunningServer, model_name: str) -> None:
    stranger = server.connect(model_name)
    for call in (stranger.pull, lambda: stranger.push(grads()), stranger.pull_state):
        with pytest.raises(UnknownModel, match=f"'{model_name}'.*first worker to attach creates"):
            call()


def test_a_reader_never_joins(session: Session, server: RunningServer) -> None:
    reader = server.connect(session.model, "reader")
    check(reader.pull(), local([]))
    for count in (1, 2):
        session.push(grads())
        check(reader.pull(), local([grads()] * count))
        assert reader.version == count
    assert np.array_equal(reader.pull_rows("table", [1]), reader.pull()["table"][[1]])
    listed = server.rest("GET", f"/v1/models/{session.model}/workers").json()["workers"]
    assert [worker["name"] for worker in listed] == ["w0"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_dtypes_are_held_as_they_are(server: RunningServer, model_name: str, dtype: Any) -> None:
    made = server.connect(model_name)
    made.create({"w": np.array([1 / 3, 2 / 3], dtype)}, [{"rule": "adagrad", "params": ["w"], "lr": 0.25}])
    _, got = made.exchange({"w": np.array([1.0, -1.0], dtype)})
    assert got["w"].dtype == dtype
    # to this dtype's precision, with Adagrad's eps of 1e-10 beside float64's
    expected = [float(dtype(1 / 3)) - 0.25, float(dtype(2 / 3)) + 0.25]
    assert got["w"].tolist() == pytest.approx(expected, rel=max(float(np.finfo(dtype).eps), 1e-9))


def test_scalars_and_empty_arrays(server: RunningServer, model_name: str) -> None:
    made = server.connect(model_name)
    made.create({"scalar": np.float32(2.0), "none": np.zeros((0, 3), np.float32)})
    receipt, got = made.exchange({"scalar": np.float32(1.0), "none": np.zeros((0, 3), np.float32)})
    assert receipt.version == 1
    assert got["none"].shape == (0, 3)
    assert got["scalar"].shape == () and 1.9 < got["scalar"] < 2.0


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
def test_a_gradient_of_no_rows(server: RunningServer, model_name: str, wire: Any) -> None:
    made = server.connect(model_name, wire=wire)
    made.create({"table": np.ones((9, 3), np.float32)})
    nothing = np.empty(0, np.int64), np.empty((0, 3), np.float32)
    receipt, got = made.exchange({"table": nothing})
    assert receipt.version == 1
    assert (got["table"] == 1).all()


# --- wire dtypes


@pytest.mark.parametrize(
    ("wire", "exact"),
    [
        (None, True),
        (torch.float32, True),
        (torch.float64, True),
        ((torch.bfloat16, None), True),
        ((torch.bfloat16, torch.float32), True),
        (torch.bfloat16, False),
        ((None, torch.float16), False),
    ],
    ids=str,
)
def test_wire_dtypes(server: RunningServer, model_name: str, wire: Any, exact: bool) -> None:
    """These gradients are exact in bfloat16, so the server's values are; only what is pulled may be rounded."""
    made = server.connect(model_name, wire=wire)
    made.create(values(), GROUPS)
    steps = [grads(), grads(-0.5)]
    for step in steps:
        _, got = made.exchange(step)
    truth = local(steps)
    check(server.connect(model_name, "reader").pull(), truth)
    pull = wire[1] if isinstance(wire, tuple) else wire
    rounded = {name: tensor.to(pull or tensor.dtype).float() for name, tensor in truth.items()}
    assert exact == all(torch.equal(rounded[name], truth[name]) for name in truth)
    check(got, rounded)
    assert np.array_equal(made.pull_rows("table", [0, 2]), rounded["table"][[0, 2]].numpy())


def test_a_push_in_bfloat16_is_rounded_once(server: RunningServer, model_name: str) -> None:
    made = server.connect(model_name, wire=(torch.bfloat16, None))
    made.create(values(), GROUPS)
    third = {"bias": np.float32([1 / 3, 2 / 3, 1 / 7])}
    _, got = made.exchange(third)
    check(got, local([{"bias": torch.from_numpy(third["bias"]).bfloat16().float()}]))


def test_an_optimizer_over_bfloat16_frames(server: RunningServer, model_name: str) -> None:
    model = Network(sparse=True)
    remote = server.connect(model_name, wire=torch.bfloat16).attach(adagrad(model), module=model)
    for seed in range(3):
        backward(model, [remote], seed)
        remote.step()
    truth = server.connect(model_name, "reader").pull()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.from_numpy(truth[name]).bfloat16().float()), name


# --- where the server is


def test_over_the_unix_socket(server: RunningServer, model_name: str) -> None:
    assert Path(server.unix).is_socket()
    made = server.connect(model_name, address=f"unix:{server.unix}")
    made.create(values(), GROUPS)
    _, got = made.exchange(grads())
    check(got, local([grads()]))


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([{"rule": "adagrad", "params": ["w"]}], "look at v"),
        ([{"rule": "adagrad", "params": ["w", "v", "x"]}], "look at x"),
        (
            [{"rule": "adagrad", "params": ["w", "v"]}, {"rule": "adadelta", "params": ["v"]}],
            "exactly one group",
        ),
        ([{"params": ["w", "v"]}], "needs a rule"),
        ([{"rule": "sgd", "params": ["w", "v"]}], "needs a rule"),
    ],
)
def test_create_refuses_groups_that_do_not_fit(
    server: RunningServer, model_name: str, groups: list[dict[str, Any]], words: str
) -> None:
    session = server.connect(model_name)
    with pytest.raises(InvalidManifest, match=words):
        session.create({"w": np.zeros(2, np.float32), "v": np.zeros(2, np.float32)}, groups)
    assert server.rest("GET", f"/v1/models/{model_name}").status_code == 404


def test_staleness_counts_from_where_the_worker_last_looked(server: RunningServer, model_name: str) -> None:
    session = server.connect(model_name)
    session.create({"w": np.zeros(2, np.float32)})
    gradient = {"w": np.ones(2, np.float32)}
    assert [session.push(gradient).staleness for _ in range(3)] == [0, 1, 2]
    session.pull()
    assert [session.push(gradient).staleness for _ in range(2)] == [0, 1]


@pytest.mark.parametrize(("ids", "error"), [([1.7], WrongDtype), ([5], RowOutOfRange), ([-1], RowOutOfRange)])
def test_rows_that_are_none(
    server: RunningServer, model_name: str, ids: list[float], error: type[Exception]
) -> None:
    session = server.connect(model_name)
    session.create({"e": np.zeros((3, 2), np.float32)})
    with pytest.raises(error):
        session.pull_rows("e", ids)
    assert session.pull_rows("e", []).shape == (0, 2)


def test_worker_state_comes_back_to_whoever_joins_under_the_name(
    server: RunningServer, model_name: str
) -> None:
    first = server.connect(model_name, "a")
    first.create({"w": np.zeros(2, np.float32)})
    assert first.worker_state == b""
    first.worker_state = b"batch 1"
    assert first.worker_state == b"batch 1"
    first.push({"w": np.ones(2, np.float32)})
    first.push({"w": np.ones(2, np.float32)})  # which carries none, and takes none away
    first.close()
    for name, expected in (("a", b"batch 1"), ("b", b"")):
        again = server.connect(model_name, name)
        again.member()
        assert again.worker_state == expected
    with pytest.raises(TypeError, match="bytes"):
        again.worker_state = "text"  # type: ignore[assignment]
    again.worker_state = bytes(64 * 1024 + 1)
    with pytest.raises(TooLong, match="65536"):
        again.push({"w": np.ones(2, np.float32)})
    again.worker_state = bytes(64 * 1024)
    assert again.push({"w": np.ones(2, np.float32)}).outcome == "applied"
