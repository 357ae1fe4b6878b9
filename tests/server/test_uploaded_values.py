"""Extras, states and tied weights that workers upload: counted, checked, and never several times their size."""

from __future__ import annotations

import io
import itertools
import json
import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from pushstep.client import Session
from pushstep.proto import training_pb2 as pb
from pushstep.proto.types_pb2 import DType, Manifest, Parameter, ParamGroup, Segment
from pushstep.proto.wire.layout import Layout
from tests.support.servers import operators
from tests.support.servers.harness import RunningServer, forget_peak, memory_bytes, running_server
from tests.support.workers.wire import RawWorker, Wire, untouched

MIB = 1 << 20
MAX_BYTES = 48 * MIB
MODEL = "values"
VALUES = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "d": np.ones(4, np.float32)}
GROUPS = [
    {"rule": "adagrad", "params": ["a"], "lr": 0.1},
    {"rule": "adadelta", "params": ["d"], "lr": 1.0},
]
_numbers = itertools.count()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that may hold little."""
    with running_server(tmp_path_factory.mktemp("small") / "data", "--max-bytes", str(MAX_BYTES)) as running:
        yield running


@pytest.fixture(scope="module")
def owner(small: RunningServer) -> Session:
    session = small.connect(MODEL, "owner")
    session.create(VALUES, GROUPS)
    session.push(VALUES)
    return session


@pytest.fixture
def wire(small: RunningServer) -> Iterator[Wire]:
    opened = Wire(small.grpc)
    yield opened
    opened.close()


@pytest.fixture
def lead(owner: Session, wire: Wire) -> RawWorker:
    """Who leads: only its extras count."""
    return RawWorker(wire, MODEL, "owner", takeover=True)


def file(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    """A safetensors file, or what passes for one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def upload(lead: RawWorker, content: bytes) -> list[bytes]:
    header = pb.UploadHeader(
        model=MODEL,
        kind=pb.UPLOAD_KIND_EXTRAS,
        identity=lead.identity(),
        extras_bytes=len(content),
        extras_all=True,
    )
    chunks = [content[at : at + 2 * MIB] for at in range(0, len(content), 2 * MIB)]
    frames = [
        pb.UploadRequest(offset=n * 2 * MIB, payload=chunk).SerializeToString()
        for n, chunk in enumerate(chunks)
    ]
    return [pb.UploadRequest(header=header).SerializeToString(), *frames]


NO_FILES: dict[str, bytes] = {
    "too short": b"abc",
    "a header longer than the file": struct.pack("<Q", 1 << 40),
    "no JSON": file(b"{"),
    "a list": file(b"[]"),
    "nested without end": file(b"[" * 100_000),
    "an odd dtype": file({"x": entry("F4", [2], 0, 1)}, b"\0"),
    "no dtype": file({"x": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "beyond the end": file({"x": entry("F32", [2], 0, 8)}, bytes(4)),
    "backwards": file({"x": entry("F32", [1], 4, 0)}, bytes(4)),
    "another length": file({"x": entry("F32", [3], 0, 8)}, bytes(8)),
    "a negative shape": file({"x": entry("F32", [-1], 0, 4)}, bytes(4)),
    "one place under many names": file(
        {f"x{n}": entry("U8", [MIB], 0, MIB) for n in range(1000)}, bytes(MIB)
    ),
    "a parameter's name": file({"a": entry("F32", [1], 0, 4)}, bytes(4)),
    "a long header": file(b" " * (5 * MIB)),
}


@pytest.mark.parametrize("case", NO_FILES)
def test_extras_that_are_none_are_refused_by_name(case: str, small: RunningServer, lead: RawWorker) -> None:
    with untouched(small, MODEL):
        forget_peak(small.process.pid)
        before = memory_bytes(small.process.pid)
        error = lead.wire.refused("Upload", upload(lead, NO_FILES[case]))
        assert memory_bytes(small.process.pid, "VmHWM") - before < 64 * MIB
    assert error.code == "malformed_frame"
    if case == "an odd dtype":
        assert "'x'" in error.message
        assert "F4" in error.message


def test_extras_count_and_do_not_peak(small: RunningServer, lead: RawWorker) -> None:
    """At most twice their size exists at a time: what is received, and what is kept of it."""

    def held() -> int:
        return int(small.rest("GET", "/v1/capacity").json()["bytes"]["held"])

    before, size = held(), 40 * MIB
    content = file({"x": entry("U8", [size], 0, size)}, bytes(size))
    for _ in range(2):  # the second time beside what staging keeps of the first
        lead.wire.answers("Upload", upload(lead, file({})))
        forget_peak(small.process.pid)
        rss = memory_bytes(small.process.pid)
        lead.wire.answers("Upload", upload(lead, content))
        assert memory_bytes(small.process.pid, "VmHWM") - rss < 2 * size + 24 * MIB
        assert held() - before == size
    assert (
        lead.wire.refused("Upload", upload(lead, content)).code == "over_capacity"
    )  # beside those there are
    with pytest.raises(Exception, match="max-bytes"):
        small.connect("beside").create({"w": np.zeros(2 * MIB, np.float32)})
    lead.wire.answers("Upload", upload(lead, file({})))
    assert held() == before


STATES = [
    ("sum", -5.0),
    ("sum", math.nan),
    ("sum", math.inf),
    ("square_avg", -1e-30),
    ("acc_delta", math.nan),
]


def state_segment(layout: Layout, name: str) -> Segment:
    slot = layout.slot("a" if name == "sum" else "d", MODEL)
    return Segment(arena=slot.arena, start=slot.start, stop=slot.stop, dtype=DType.DTYPE_FLOAT32, state=name)


@pytest.mark.parametrize("kind", ["STATE", "PARAMETERS", "CREATE"])
@pytest.mark.parametrize(("name", "value"), STATES)
def test_a_state_that_no_step_can_leave(
    kind: str, name: str, value: float, small: RunningServer, wire: Wire, lead: RawWorker
) -> None:
    """One bad element among good ones, however it comes."""
    values = torch.ones(6 if name == "sum" else 4)
    values[-1] = value
    upload_kind = pb.UploadKind.Value(f"UPLOAD_KIND_{kind}")
    if kind == "CREATE":
        asked = pb.JoinRequest(model=f"m{next(_numbers)}", worker="w", manifest=lead.member.manifest)
        ticket = pb.JoinResponse.FromString(wire.answers("Join", [asked.SerializeToString()])[0]).create
        layout = Layout(ticket.manifest)
        segments = [segment for segment, _ in layout.whole(None)] + [state_segment(layout, name)]
        header = pb.UploadHeader(model=asked.model, kind=upload_kind, ticket=ticket.ticket, segments=segments)
        payloads = [bytes(24), bytes(16), values.numpy().tobytes()]
    else:
        header = pb.UploadHeader(
            model=MODEL,
            kind=upload_kind,
            identity=lead.identity(),
            segments=[state_segment(lead.layout, name)],
            manifest_hash=lead.member.manifest_hash,
            force=True,
        )
        payloads = [values.numpy().tobytes()]
    messages = [pb.UploadRequest(header=header).SerializeToString()]
    messages += [pb.UploadRequest(segment=n, payload=p).SerializeToString() for n, p in enumerate(payloads)]
    with untouched(small, MODEL):
        error = wire.refused("Upload", messages)
    assert error.code == "invalid_state"
    assert error.fields["state"] == name
    assert error.fields["parameter"] == ("a" if name == "sum" else "d")
    models = [model["name"] for model in small.rest("GET", "/v1/models").json()["models"]]
    assert models == [MODEL]


def test_steps_beyond_what_can_be_counted(small: RunningServer, lead: RawWorker) -> None:
    header = pb.UploadHeader(
        model=MODEL,
        kind=pb.UPLOAD_KIND_STATE,
        identity=lead.identity(),
        manifest_hash=lead.member.manifest_hash,
        steps=[2**64 - 1, 0],
        force=True,
    )
    with untouched(small, MODEL):
        error = lead.wire.refused("Upload", [pb.UploadRequest(header=header).SerializeToString()])
    assert error.code == "number_out_of_range"


def tied(aliases: int, elements: int) -> Manifest:
    return Manifest(
        parameters=[
            Parameter(
                name="w",
                shape=[elements],
                dtype=DType.DTYPE_FLOAT32,
                aliases=[f"tied{n}" for n in range(aliases)],
            )
        ],
        groups=[ParamGroup(rule="adagrad")],
    )


def test_tied_weights_count_as_often_as_a_checkpoint_has_them(small: RunningServer, wire: Wire) -> None:
    request = pb.JoinRequest(model="tied", worker="w", manifest=tied(400, MIB // 4))
    assert wire.refused("Join", [request.SerializeToString()]).code == "over_capacity"


class Tied(torch.nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.first = torch.nn.Linear(1000, 500, bias=False)
        for number in range(count):
            layer = torch.nn.Linear(1000, 500, bias=False)
            layer.weight = self.first.weight
            self.add_module(f"layer{number}", layer)
        self.register_buffer("mean", torch.arange(3.0))


def test_a_checkpoint_of_tied_weights_loads_and_takes_no_memory(
    server: RunningServer, model_name: str
) -> None:
    """As often as it is written, it is in memory once."""
    module = Tied(20)
    session = server.connect(model_name)
    session.attach(torch.optim.Adagrad(module.parameters()), module=module)
    session.close()
    size = 4 * 1000 * 500
    for form in ("safetensors", "torch"):
        operators.download(server, f"{model_name}/export", form)
        forget_peak(server.process.pid)
        rss = memory_bytes(server.process.pid)
        content = operators.download(server, f"{model_name}/export", form)
        assert memory_bytes(server.process.pid, "VmHWM") - rss < 6 * size
        found = (
            load(content)
            if form == "safetensors"
            else torch.load(io.BytesIO(content), weights_only=True)["model"]
        )
        other = Tied(20)
        other.load_state_dict(found)
        assert torch.equal(other.layer19.weight, module.first.weight)
        assert torch.equal(other.mean, module.mean)
        if form == "torch":
            assert len(content) < 4 * size  # parameters and state, each once
