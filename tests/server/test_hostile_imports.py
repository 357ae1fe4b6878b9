"""Files that are not right, and bodies that do not come as they should: nothing changes, and memory stays bounded."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from tests.support.servers.harness import RunningServer, forget_peak, memory_bytes, running_server
from tests.support.workers.wire import GROUPS, PARAMETERS, created, untouched

MIB = 1 << 20


def put(server: RunningServer, model: str, body: bytes, **query: str) -> httpx.Response:
    return server.rest("PUT", f"/v1/models/{model}/state-dict", content=body, params=query)


def post(server: RunningServer, body: bytes, **query: str) -> httpx.Response:
    return server.rest("POST", "/v1/models", content=body, params=query)


def header(entries: Any, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, *shape: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


# Files that are not right. MODEL's parameters: table (5, 3), weight (4, 2), bias (4), scale ().

TENSORS = {name: torch.from_numpy(value) for name, value in PARAMETERS.items()}


def changed(**tensors: Tensor | None) -> bytes:
    found = {**TENSORS, **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    return save({name: tensor for name, tensor in found.items() if tensor is not None})


def with_state(**tensors: Tensor | None) -> bytes:
    state = {f"optimizer__step__{name}": torch.tensor(1) for name in TENSORS}
    state["optimizer__sum__table"] = torch.ones(5, 3)
    for name in ("weight", "bias", "scale"):
        for kind in ("square_avg", "acc_delta"):
            state[f"optimizer__{kind}__{name}"] = torch.ones(TENSORS[name].shape)
    return changed(**{**state, **tensors})


def zip_bomb() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(64 * MIB))
    return made.getvalue()


class Harm:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("harm").write_text, ("done",))


def torch_file() -> bytes:
    made = io.BytesIO()
    torch.save(TENSORS, made)
    return made.getvalue()


NAN, INF = float("nan"), float("inf")
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "invalid_file"),
    "a pickle": (lambda: pickle.dumps(Harm()), "invalid_file"),
    "a torch file": (torch_file, "invalid_file"),
    "a zip bomb": (zip_bomb, "invalid_file"),
    "random bytes": (lambda: hashlib.sha512(b"").digest() * 100, "invalid_file"),
    "a header without end": (lambda: (1 << 63).to_bytes(8, "little") + b"{}", "invalid_file"),
    "a header behind the file": (lambda: (100).to_bytes(8, "little") + b"{}", "invalid_file"),
    "a header of 5 MiB": (lambda: (5 * MIB).to_bytes(8, "little") + b" " * 5 * MIB, "invalid_file"),
    "a deep header": (lambda: (4 * MIB).to_bytes(8, "little") + b"[" * 4 * MIB, "invalid_file"),
    "a header that is a list": (lambda: header([]), "invalid_file"),
    "metadata that is a number": (lambda: header({"__metadata__": 1}), "invalid_file"),
    "no tensors": (lambda: header({}), "invalid_file"),
    "100,000 tensors": (lambda: header({f"t{i}": entry(0, 0, 0) for i in range(100_000)}), "invalid_file"),
    "30,000 tensors": (lambda: header({f"t{i}": entry(0, 0, 0) for i in range(30_000)}), "unknown_parameter"),
    "a size of 2^63": (lambda: header({"bias": entry(0, 2**63, 2**61)}), "invalid_file"),
    "a size of 2^64 that is 0": (lambda: header({"bias": entry(0, 0, 2**62, 4)}), "invalid_file"),
    "a length of 2^63 behind a 0": (lambda: header({"bias": entry(0, 0, 0, 2**63)}), "invalid_file"),
    "lengths of 2^40 behind a 0": (lambda: header({"bias": entry(0, 0, 0, 2**40, 2**40)}), "invalid_file"),
    "a negative offset": (lambda: header({"bias": entry(-16, 0, 4)}, bytes(16)), "invalid_file"),
    "an end before its begin": (lambda: header({"bias": entry(16, 0, 4)}, bytes(16)), "invalid_file"),
    "an overlap": (
        lambda: header({"bias": entry(0, 16, 4), "scale": entry(12, 16)}, bytes(16)),
        "invalid_file",
    ),
    "the same bytes a thousand times": (
        lambda: header({f"t{i}": entry(0, MIB, MIB // 4) for i in range(1000)}, bytes(MIB)),
        "invalid_file",
    ),
    "a hole": (lambda: header({"bias": entry(0, 16, 4), "scale": entry(20, 24)}, bytes(24)), "invalid_file"),
    "bytes before the first": (lambda: header({"bias": entry(4, 20, 4)}, bytes(20)), "invalid_file"),
    "bytes behind the last": (lambda: header({"bias": entry(0, 16, 4)}, bytes(20)), "invalid_file"),
    "a tensor beyond the end": (lambda: header({"bias": entry(0, 16, 4)}, bytes(12)), "invalid_file"),
    "a shape that is not its bytes": (lambda: header({"bias": entry(0, 16, 5)}, bytes(16)), "invalid_file"),
    "an unknown type": (lambda: header({"bias": entry(0, 16, 4, dtype="F4")}, bytes(16)), "invalid_file"),
    "a missing parameter": (lambda: changed(bias=None), "invalid_file"),
    "an unknown parameter": (lambda: changed(other=torch.ones(1)), "unknown_parameter"),
    "another shape": (lambda: changed(bias=torch.ones(5)), "wrong_shape"),
    "a transposed shape": (lambda: changed(weight=torch.ones(2, 4)), "wrong_shape"),
    "another dtype": (lambda: changed(bias=torch.ones(4).double()), "wrong_dtype"),
    "a dtype of the same size": (lambda: changed(bias=torch.ones(4).int()), "wrong_dtype"),
    "NaN": (lambda: changed(scale=torch.tensor(NAN)), "nonfinite_parameter"),
    "infinity": (lambda: changed(table=torch.full((5, 3), -INF)), "nonfinite_parameter"),
    "state without a step": (lambda: with_state(optimizer__step__bias=None), "invalid_file"),
    "state of some": (lambda: with_state(optimizer__acc_delta__bias=None), "invalid_file"),
    "state of another rule": (lambda: with_state(optimizer__sum__bias=torch.ones(4)), "invalid_file"),
    "negative state": (lambda: with_state(optimizer__sum__table=-torch.ones(5, 3)), "invalid_state"),
    "state that is NaN": (
        lambda: with_state(optimizer__square_avg__scale=torch.tensor(NAN)),
        "invalid_state",
    ),
    "state of another shape": (lambda: with_state(optimizer__sum__table=torch.ones(3)), "wrong_shape"),
    "state of another dtype": (
        lambda: with_state(optimizer__sum__table=torch.ones(5, 3).half()),
        "wrong_dtype",
    ),
    "a step that is a float": (lambda: with_state(optimizer__step__bias=torch.tensor(1.0)), "wrong_dtype"),
    "a negative step": (lambda: with_state(optimizer__step__bias=torch.tensor(-1)), "number_out_of_range"),
    "a step of 2^62": (lambda: with_state(optimizer__step__bias=torch.tensor(2**62)), "number_out_of_range"),
}


@pytest.fixture(scope="module")
def target(server: RunningServer) -> str:
    created(server, "imports-target")
    return "imports-target"


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_is_not_right_changes_nothing(server: RunningServer, target: str, case: str) -> None:
    make, code = HOSTILE[case]
    pid, body = server.process.pid, make()
    forget_peak(pid)
    before = memory_bytes(pid)
    with untouched(server, target):
        answer = put(server, target, body)
        assert answer.json()["code"] == code, answer.text
        assert 400 <= answer.status_code < 500
        assert answer.headers["content-type"] == "application/problem+json"
        made = post(server, body, name="imports-made", groups=json.dumps(GROUPS))
    assert memory_bytes(pid, "VmHWM") - before < 100 * MIB
    if made.status_code == 201:  # what is no parameter may be a buffer of a new model
        assert code == "unknown_parameter" or case.startswith(
            ("a transposed", "another", "state of another rule")
        )
        server.rest("DELETE", "/v1/models/imports-made")
    else:
        assert 400 <= made.status_code < 500, made.text
    assert not Path("harm").exists()


def test_the_files_of_the_table_are_right_but_for_one_thing(server: RunningServer, target: str) -> None:
    assert put(server, target, changed()).status_code == 200
    assert put(server, target, with_state()).json()["state"] == "replaced"
    with untouched(server, target):
        answer = put(server, target, with_state(), keep_state="true")
        assert answer.json()["code"] == "invalid_settings"


# Bodies that do not come as they should.


def raw(server: RunningServer, head: str, body: bytes = b"", *, ends: bool = False) -> tuple[int, str]:
    """Status and code of what a request in these bytes is answered with; none if its sender goes away."""
    host, _, port = server.http.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"{head}\r\nhost: {server.http}\r\n\r\n".encode() + body)
        if ends:
            return 0, ""
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, json.loads(answer.read())["code"]


@pytest.mark.parametrize(
    "route", ["PUT /v1/models/imports-target/state-dict", "POST /v1/models?name=imports-made"]
)
def test_bodies_that_do_not_come_as_they_should(server: RunningServer, target: str, route: str) -> None:
    start, body = f"{route} HTTP/1.1\r\n", changed()
    too_long = (413, "message_too_large") if route.startswith("PUT") else (409, "over_capacity")
    pid = server.process.pid
    forget_peak(pid)
    before = memory_bytes(pid)
    with untouched(server, target):
        for framing, refused in (
            ("transfer-encoding: chunked", (411, "length_required")),
            ("accept: */*", (411, "length_required")),
            (f"content-length: {1 << 41}", too_long),
            (f"content-length: {1 << 39}", (409, "over_capacity")),
            ("content-length: -1", (400, "malformed_request")),
            ("content-length: 10\r\ntransfer-encoding: chunked", (400, "malformed_request")),
        ):
            assert raw(server, start + framing) == refused, framing
        # a sender that goes away half way, and one that sends more than it said
        raw(server, f"{start}content-length: {len(body)}", body[:-1], ends=True)
        assert raw(server, f"{start}content-length: {len(body) - 4}", body) == (422, "invalid_file")
    assert memory_bytes(pid, "VmHWM") - before < 50 * MIB
    assert server.rest("GET", "/v1/models/imports-made").status_code == 404


def test_a_slow_sender_is_dropped_and_its_room_is_free(data: Path) -> None:
    """In the time that a body has, 256 KiB have to come; the next file gets the room that the slow one had."""
    with running_server(data, "--stall-s", "0.1", "--staging-bytes", str(64 * MIB)) as server:
        created(server, "m").close()
        head = f"PUT /v1/models/m/state-dict HTTP/1.1\r\ncontent-length: {48 * MIB}"
        assert raw(server, head, bytes(MIB)) == (408, "request_timeout")
        large = save({"w": torch.zeros(10 * MIB)})
        assert post(server, large, name="large", groups='[{"rule": "adagrad"}]').status_code == 201


def test_a_file_beyond_the_limits_of_the_server(data: Path) -> None:
    with running_server(data, "--max-bytes", str(8 * MIB), "--max-models", "2") as server:
        groups = json.dumps([{"rule": "adagrad"}])
        assert post(server, save({"w": torch.zeros(1)}), name="a", groups=groups).status_code == 201
        wide = post(server, save({"w": torch.zeros(MIB)}), name="b", groups=groups)  # with its state 8 MiB
        assert (wide.status_code, wide.json()["code"]) == (409, "over_capacity")
        buffers = post(
            server, save({"w": torch.zeros(1), "n": torch.zeros(7 * MIB).byte()}), name="b", groups=groups
        )
        assert buffers.status_code == 201, buffers.text
        assert (
            post(server, save({"w": torch.zeros(1)}), name="c", groups=groups).json()["code"]
            == "over_capacity"
        )
