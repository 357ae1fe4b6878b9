"""Wire dtypes and top-k pushes: what the server gets, and what a session keeps of what it did not send."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pushstep import optim
from pushstep.client import Session
from pushstep.client.gradients.body import push_body
from pushstep.client.gradients.compression import Compression, Quantised, push_and_pull
from pushstep.client.membership.receipt import Outcome
from pushstep.proto.errors import InvalidSettings, NonfiniteGradient, WrongDtype
from pushstep.proto.training_pb2 import PushRequest
from pushstep.proto.types_pb2 import DType, Manifest, Parameter, ParamGroup
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.bodies import check_body
from pushstep.proto.wire.buffers import BufferPool
from pushstep.proto.wire.frames import Assembly, pack, unpack
from pushstep.proto.wire.layout import Layout
from pushstep.server.staging.unpack import dense_part, rows_parts
from tests.simulation.seeded_bugs import Bug, found_by
from tests.support.servers.harness import RunningServer
from tests.support.servers.operators import add_hook, restore, take_snapshot

WEIGHT, BIAS, TABLE = "weight", "bias", "table"
LAYOUT = Layout(
    Manifest(
        parameters=[
            Parameter(name=WEIGHT, shape=[9, 1001], dtype=DType.DTYPE_FLOAT32),
            Parameter(name=BIAS, shape=[3], dtype=DType.DTYPE_FLOAT32),
            Parameter(name=TABLE, shape=[50, 300], dtype=DType.DTYPE_FLOAT32),
        ],
        groups=[ParamGroup(rule="adagrad")],
    )
)
SLOTS = {slot.name: slot for slot in LAYOUT.slots}


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def received(compression: Compression, gradients: dict[str, Any]) -> dict[str, Any]:
    """What a server unpacks of a push, by parameter: a tensor, or (ids, rows)."""
    body = push_body(LAYOUT, {SLOTS[name]: gradient for name, gradient in gradients.items()}, compression)
    assembly = Assembly(check_body(LAYOUT, body.segments, 1 << 30, of_push=True))
    for frame in pack(body.pieces):
        chunk = unpack(frame, PushRequest)[1]
        assert chunk is not None
        assembly.place(chunk)
    assembly.finish()
    found: dict[str, Any] = {}
    by_rows = rows_parts(
        body.segments, list(map(LAYOUT.slots_of, body.segments)), assembly, BufferPool(0).take
    )
    for index, segment in enumerate(body.segments):
        slots = LAYOUT.slots_of(segment)
        if segment.HasField("rows"):
            rows = by_rows[index]
            found[slots[0].name] = rows.ids, rows.rows
            continue
        part, _ = dense_part(segment, slots, assembly, index, BufferPool(0).take)
        for slot in slots:
            flat = part.gradient[slot.start - segment.start : slot.stop - segment.start]
            found[slot.name] = flat.view(slot.shape)
    return found


def quantum(values: Tensor) -> Tensor:
    """The scale of each element's block."""
    flat = values.detach().float().reshape(-1)
    blocks = [part.abs().max().expand(part.numel()) for part in flat.split(dtypes.INT8_BLOCK)]
    return (torch.cat(blocks) / 127).view(values.shape)


# Half a unit in the last place of what each keeps; int8's half a scale has a float32 rounding in each of two places.
BOUNDS: dict[torch.dtype, Callable[[Tensor], Tensor]] = {
    torch.float32: torch.zeros_like,
    torch.bfloat16: lambda values: values.abs() * 2.0**-8,
    torch.float16: lambda values: (values.abs() * 2.0**-11).clamp(min=2.0**-25),
    torch.int8: lambda values: quantum(values) * (0.5 + 2.0**-15),
}


def test_a_session_comes_without_kernels() -> None:
    """numba takes 0.2 s to import, and a worker needs it at the first push that merges or compresses something."""
    code = "import sys, pushstep.client.connection; assert 'numba' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("wire", BOUNDS, ids=str)
def test_a_push_errs_by_no_more_than_its_dtype_says(wire: torch.dtype) -> None:
    gradients = {WEIGHT: noise(0, 9, 1001), BIAS: noise(1, 3) * 1e-3}
    found = received(Compression(wire, None), gradients)
    for name, gradient in gradients.items():
        error = (found[name].double() - gradient.double()).abs()
        assert (error <= BOUNDS[wire](gradient)).all()
        assert wire is torch.float32 or error.any()


@pytest.mark.parametrize("wire", BOUNDS, ids=str)
def test_rows_err_by_no_more_than_their_dtype_says(wire: torch.dtype) -> None:
    """Duplicates are merged, in order of appearance, before anything is rounded."""
    ids, rows = torch.tensor([7, 3, 7, 49]), noise(2, 4, 300)
    merged = torch.stack([rows[1], rows[0] + rows[2], rows[3]])
    found_ids, found = received(Compression(wire, None), {TABLE: (ids, rows)})[TABLE]
    assert found_ids.tolist() == [3, 7, 49]
    for row, expected in zip(found, merged, strict=True):
        assert ((row.double() - expected.double()).abs() <= BOUNDS[wire](expected)).all()


COMPRESSIONS = [
    pytest.param(torch.int8, None, id="int8"),
    pytest.param(None, 0.01, id="top-k"),
    pytest.param(torch.bfloat16, 0.1, id="top-k in bfloat16"),
    pytest.param(torch.float16, 0.1, id="top-k in float16"),
]


@pytest.mark.parametrize(("wire", "top_k"), COMPRESSIONS)
def test_what_was_applied_adds_up_to_the_gradients(wire: torch.dtype | None, top_k: float | None) -> None:
    """But for what is still owed, and the float32 roundings of the sums."""
    compression = Compression(wire, top_k)
    total = {WEIGHT: torch.zeros(9, 1001).double(), BIAS: torch.zeros(3).double()}
    applied = {name: value.clone() for name, value in total.items()}
    largest = {name: torch.zeros_like(value) for name, value in total.items()}
    for step in range(30):
        gradients = {WEIGHT: noise(step, 9, 1001), BIAS: noise(100 + step, 3)}
        before = {name: compression.residuals.get(name, torch.zeros(1)) for name in gradients}
        found = received(compression, gradients)
        compression.settle(applied=True)
        for name, gradient in gradients.items():
            total[name] += gradient.double()
            applied[name] += found[name].double()
            owed = (gradient.flatten() + before[name]).view(gradient.shape)
            largest[name] = torch.maximum(largest[name], owed.abs().double())
    for name in total:
        owed = compression.residuals[name].view(total[name].shape).double()
        assert ((total[name] - applied[name] - owed).abs() <= 30 * largest[name] * 2.0**-24).all()
        if wire is torch.int8:  # within one quantum: half of the last one, and what the sums were rounded by
            assert ((total[name] - applied[name]).abs() <= quantum(largest[name])).all()


def test_touched_rows_alone_owe() -> None:
    compression = Compression(torch.int8, None)
    first, second = noise(0, 2, 300), noise(1, 2, 300)
    _, sent = received(compression, {TABLE: (torch.tensor([4, 9]), first)})[TABLE]
    compression.settle(applied=True)
    owed = compression.residuals[TABLE].clone()
    assert torch.equal(owed[[4, 9]], first - sent)
    assert owed.abs().sum(dim=1).nonzero().flatten().tolist() == [4, 9]
    ids, sent = received(compression, {TABLE: (torch.tensor([30, 9]), second)})[TABLE]
    compression.settle(applied=True)
    assert ids.tolist() == [9, 30]
    assert torch.equal(compression.residuals[TABLE][9], second[1] + owed[9] - sent[0])
    assert torch.equal(compression.residuals[TABLE][4], owed[4])


@pytest.mark.parametrize(("wire", "top_k"), COMPRESSIONS)
def test_a_push_that_was_not_applied_owes_what_was_owed_before(
    wire: torch.dtype | None, top_k: float | None
) -> None:
    compression = Compression(wire, top_k)
    gradients: dict[str, Any] = {WEIGHT: noise(3, 9, 1001), TABLE: (torch.tensor([1]), noise(4, 1, 300))}
    first = received(compression, gradients)
    compression.settle(applied=True)
    held = {name: value.clone() for name, value in compression.residuals.items()}
    second = received(compression, gradients)
    compression.settle(applied=False)
    assert held.keys() == compression.residuals.keys()
    assert all(torch.equal(value, compression.residuals[name]) for name, value in held.items())
    again = received(compression, gradients)
    assert torch.equal(again[WEIGHT], second[WEIGHT])
    assert torch.equal(again[TABLE][1], second[TABLE][1])
    assert not torch.equal(again[WEIGHT], first[WEIGHT])


def test_a_retry_sends_the_same_bytes_whatever_became_of_the_gradient() -> None:
    gradient = noise(0, 9, 1001)
    body = push_body(LAYOUT, {SLOTS[WEIGHT]: gradient}, Compression(torch.int8, None))
    sent = list(pack(body.pieces))
    gradient.zero_()
    assert list(pack(body.pieces)) == sent


@pytest.mark.parametrize("sizes", [(1,), (7, 260, 3), (259, 1, 300), (1 << 20,)])
def test_codes_do_not_depend_on_how_they_are_asked_for(sizes: tuple[int, ...]) -> None:
    gradient, owed = noise(0, 10 * 601), noise(1, 10 * 601)
    whole = Quantised(gradient, owed, 601, BufferPool(0).take)
    expected = torch.empty(whole.nbytes, dtype=torch.uint8)
    whole.writer()(expected, 0)
    parts = Quantised(gradient, owed, 601, BufferPool(0).take)
    got = torch.empty_like(expected)
    at = turn = 0
    while at < got.numel():
        size = sizes[turn % len(sizes)]
        parts.writer()(got[at : at + size], at)
        at, turn = at + size, turn + 1
    assert torch.equal(got, expected)
    assert torch.equal(parts.rest, whole.rest)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("wire", "top_k"), COMPRESSIONS)
def test_what_is_not_finite_arrives_so_and_is_not_owed(
    wire: torch.dtype | None, top_k: float | None, wrong: float
) -> None:
    compression = Compression(wire, top_k)
    good = noise(0, 9, 1001)
    received(compression, {WEIGHT: good})
    compression.settle(applied=True)
    bad = good.clone()
    bad[3, 500] = wrong
    found = received(compression, {WEIGHT: bad})[WEIGHT]
    assert not torch.isfinite(found).all()
    compression.settle(applied=True)  # as under nonfinite=apply
    assert torch.isfinite(compression.residuals[WEIGHT]).all()


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1.4e-36, 1e38, 3.4e38])
def test_the_ends_of_the_range(size: float) -> None:
    """What is too small for a scale is owed and not lost."""
    compression = Compression(torch.int8, None)
    gradient = torch.tensor([size, -size, size / 3])
    found = received(compression, {BIAS: gradient})[BIAS]
    compression.settle(applied=True)
    assert torch.equal(found + compression.residuals[BIAS], gradient)
    assert torch.isfinite(found).all()
    assert found.any() == (size > 127 * 2.0**-126)


def test_top_k_takes_the_largest_and_at_least_one() -> None:
    compression = Compression(None, 0.01)
    gradients = {WEIGHT: noise(0, 9, 1001), BIAS: torch.tensor([0.5, -2.0, 1.0])}
    found = received(compression, gradients)
    assert found[BIAS].tolist() == [0, -2, 0]
    kept = found[WEIGHT].nonzero(as_tuple=True)
    assert len(kept[0]) == 90
    assert torch.equal(found[WEIGHT][kept], gradients[WEIGHT][kept])
    left = gradients[WEIGHT].clone()
    left[kept] = 0
    assert left.abs().max() <= found[WEIGHT][kept].abs().min()


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        (None, (None, None)),
        (torch.float16, (torch.float16, torch.float16)),
        ("float32", (torch.float32, torch.float32)),
        ("int8", (torch.int8, torch.bfloat16)),
        (torch.int8, (torch.int8, torch.bfloat16)),
        (("int8", torch.float32), (torch.int8, torch.float32)),
        ((torch.int8, None), (torch.int8, None)),
        ((None, "bfloat16"), (None, torch.bfloat16)),
    ],
)
def test_wires_that_can_be_asked_for(wire: Any, expected: Any) -> None:
    assert push_and_pull(wire) == expected


@pytest.mark.parametrize("wire", ["int4", torch.int32, 8, (torch.float32, "int8"), ("int8", torch.int8), ""])
def test_wires_that_cannot(wire: Any) -> None:
    with pytest.raises(WrongDtype):
        push_and_pull(wire)


@pytest.mark.parametrize("top_k", [0.0, -0.1, 1.5, math.nan])
def test_fractions_that_are_none(top_k: float) -> None:
    with pytest.raises(InvalidSettings):
        Compression(None, top_k)


def test_top_k_of_nothing_is_nothing() -> None:
    layout = Layout(
        Manifest(
            parameters=[Parameter(name=WEIGHT, shape=[0, 4], dtype=DType.DTYPE_FLOAT32)],
            groups=[ParamGroup(rule="adagrad")],
        )
    )
    slot = layout.slots[0]
    indices, values = Compression(None, 0.1).select([slot], {slot: torch.zeros(0, 4)})
    assert indices.numel() == values.numel() == 0


def test_top_k_in_int8_is_refused() -> None:
    with pytest.raises(WrongDtype):
        Compression(torch.int8, 0.1)


# Through a server.


def trained(
    server: RunningServer, model: str, steps: int = 6, **options: Any
) -> tuple[Session, list[Tensor]]:
    """A session that pushed a few gradients, and the gradients."""
    session = server.connect(model, **options)
    value = noise(77, 40, 60).numpy()
    session.create({WEIGHT: value}, [{"rule": "adagrad", "params": [WEIGHT], "lr": 0.1}])
    gradients = [noise(step, 40, 60) for step in range(steps)]
    for gradient in gradients:
        session.exchange({WEIGHT: gradient})
    return session, gradients


def parameters(server: RunningServer, model: str) -> Tensor:
    """What the server holds, in its own dtype."""
    return torch.from_numpy(server.connect(model, "reader").pull()[WEIGHT])


@pytest.mark.parametrize("wire", [None, torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_a_step_takes_exactly_what_was_sent(
    server: RunningServer, model_name: str, wire: torch.dtype | None
) -> None:
    """Bit for bit the local step on the gradients as they are after the wire; with no error feedback if exact."""
    _, gradients = trained(server, model_name, wire=wire)
    layout = Layout(
        Manifest(
            parameters=[Parameter(name=WEIGHT, shape=[40, 60], dtype=DType.DTYPE_FLOAT32)],
            groups=[ParamGroup(rule="adagrad")],
        )
    )
    here = torch.nn.Parameter(noise(77, 40, 60))
    local = optim.Adagrad([here], lr=0.1)
    compression = Compression(wire, None)
    for gradient in gradients:
        here.grad = gradient if wire is None else gradient.to(wire).float()
        if wire is torch.int8:
            piece = compression.dense(layout.slots[0], gradient)
            assert isinstance(piece, Quantised)
            piece.writer()(torch.empty(piece.nbytes, dtype=torch.uint8), 0)
            owed = compression.residuals.get(WEIGHT, torch.zeros(2400)).view(40, 60)
            here.grad = (gradient + owed) - piece.rest.view(40, 60)
            compression.settle(applied=True)
        local.step()
    assert torch.equal(parameters(server, model_name), here.detach())


def test_int8_pushes_pull_bfloat16(server: RunningServer, model_name: str) -> None:
    session, _ = trained(server, model_name, wire="int8")
    pulled = torch.from_numpy(session.pull()[WEIGHT])
    assert torch.equal(pulled, parameters(server, model_name).bfloat16().float())


@pytest.mark.parametrize(("wire", "top_k"), COMPRESSIONS)
def test_a_residual_advances_with_applied_pushes_only(
    server: RunningServer, model_name: str, wire: torch.dtype | None, top_k: float | None
) -> None:
    session, gradients = trained(server, model_name, wire=wire, top_k=top_k)
    held = session._worker.compression.residuals[WEIGHT].clone()
    assert held.any()
    bad = gradients[0].clone()
    bad[0, 0] = math.nan
    with pytest.raises(NonfiniteGradient):
        session.push({WEIGHT: bad})
    assert torch.equal(session._worker.compression.residuals[WEIGHT], held), "the residual has moved"
    add_hook(server, model_name, "finite_guard", "step_pre", {"action": "skip"})
    assert session.push({WEIGHT: bad}).outcome is Outcome.SKIPPED
    assert torch.equal(session._worker.compression.residuals[WEIGHT], held), "the residual has moved"
    assert session.push({WEIGHT: gradients[0]}).outcome is Outcome.APPLIED
    assert not torch.equal(session._worker.compression.residuals[WEIGHT], held)


@pytest.mark.parametrize("bug", found_by("compression"), ids=str)
@pytest.mark.parametrize(("wire", "top_k"), COMPRESSIONS[:2])
def test_a_seeded_bug_is_found(
    server: RunningServer,
    model_name: str,
    wire: torch.dtype | None,
    top_k: float | None,
    bug: Bug,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bug.put_in(monkeypatch)
    with pytest.raises(AssertionError, match=bug.says):
        test_a_residual_advances_with_applied_pushes_only(server, model_name, wire, top_k)


@pytest.mark.parametrize(("wire", "top_k"), COMPRESSIONS)
def test_a_restore_leaves_the_residual(
    server: RunningServer, model_name: str, wire: torch.dtype | None, top_k: float | None
) -> None:
    session, gradients = trained(server, model_name, wire=wire, top_k=top_k)
    snapshot = take_snapshot(server, model_name)["id"]
    held = session._worker.compression.residuals[WEIGHT].clone()
    restore(server, model_name, snapshot)
    with pytest.warns(RuntimeWarning, match="restored"):
        assert session.push({WEIGHT: gradients[0]}).outcome is Outcome.SUPERSEDED
    assert torch.equal(session._worker.compression.residuals[WEIGHT], held)


def test_top_k_steps_as_torch_does_on_the_dense_gradient(server: RunningServer, model_name: str) -> None:
    """Also elements whose gradient was not sent: Adadelta moves them by what it remembers."""
    session = server.connect(model_name, top_k=0.25)
    start = noise(5, 8)
    session.create({WEIGHT: start.numpy()}, [{"rule": "adadelta", "params": [WEIGHT]}])
    here = torch.nn.Parameter(start.clone())
    local = optim.Adadelta([here])
    owed = torch.zeros(8)
    for step in range(5):
        owed += noise(10 + step, 8)
        here.grad = torch.zeros(8)
        largest = owed.abs().topk(2).indices
        here.grad[largest] = owed[largest]
        owed[largest] = 0
        session.push({WEIGHT: noise(10 + step, 8)})
        local.step()
    assert torch.equal(torch.from_numpy(session.pull()[WEIGHT]), here.detach())


def test_half_rows_are_pushed_and_pulled(server: RunningServer, model_name: str) -> None:
    session = server.connect(model_name, wire="bfloat16")
    start = noise(0, 30, 8)
    session.create({TABLE: start.numpy()}, [{"rule": "adagrad", "params": [TABLE], "lr": 0.5}])
    session.pull()
    rows = noise(1, 2, 8)
    _, arrays = session.exchange({TABLE: (np.array([20, 3]), rows.numpy())})
    here = torch.nn.Parameter(start.clone())
    local = optim.Adagrad([here], lr=0.5)
    half = rows.bfloat16().float()
    here.grad = torch.sparse_coo_tensor(torch.tensor([[20, 3]]), half, (30, 8), check_invariants=True)
    local.step()
    assert torch.equal(torch.from_numpy(server.connect(model_name, "r").pull()[TABLE]), here.detach())
    assert torch.equal(torch.from_numpy(arrays[TABLE]), here.detach().bfloat16().float())


@pytest.mark.parametrize(("wire", "top_k"), COMPRESSIONS)
def test_a_prefetched_push_is_the_same(
    server: RunningServer, model_name: str, wire: torch.dtype | None, top_k: float | None
) -> None:
    """Its gradients are copied first, and not rounded by that: what is rounded off is owed."""
    owed = []
    for prefetch in (False, True):
        module = torch.nn.Linear(30, 20)
        with torch.no_grad():
            module.weight.copy_(noise(0, 20, 30))
            module.bias.copy_(noise(1, 20))
        session = server.connect(f"{model_name}-{prefetch}", wire=wire, top_k=top_k)
        optimizer = session.attach(optim.Adagrad(module.parameters()), module=module, prefetch=prefetch)
        module.weight.grad, module.bias.grad = noise(2, 20, 30), noise(3, 20)
        optimizer.step()
        optimizer.synchronize()
        owed.append((module.weight.detach(), session._worker.compression.residuals["weight"].flatten()))
    assert torch.equal(owed[0][0], owed[1][0])
    assert torch.equal(owed[0][1], owed[1][1])
    assert owed[0][1].any()
