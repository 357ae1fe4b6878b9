"""Files that operators bring in: their values come in whole, and one that is not right changes nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from pushstep.client import Outcome
from pushstep.proto import training_pb2 as pb
from tests.support.servers.harness import RunningServer, running_server
from tests.support.servers.operators import add_hook, download, patch_group, show_model
from tests.support.workers.wire import PARAMETERS, Wire, created, untouched

MIB = 1 << 20
LENGTH = {"content-type": "application/octet-stream"}
WITH_STATE = {"state": "true"}


def exported(server: RunningServer, model: str, **query: str) -> bytes:
    answer = server.rest("GET", f"/v1/models/{model}/export", params=query)
    assert answer.status_code == 200, answer.text
    return answer.content


def put(server: RunningServer, model: str, body: bytes, **query: str) -> httpx.Response:
    return server.rest("PUT", f"/v1/models/{model}/state-dict", content=body, params=query, headers=LENGTH)


def post(server: RunningServer, body: bytes, **query: str) -> httpx.Response:
    return server.rest("POST", "/v1/models", content=body, params=query, headers=LENGTH)


def replaced(server: RunningServer, model: str, tensors: dict[str, Tensor], **query: str) -> dict[str, Any]:
    answer = put(server, model, save(tensors), **query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


# What an import does.


@pytest.mark.parametrize("state", [True, False], ids=["state", "weights"])
def test_values_come_in_and_all_else_stays(server: RunningServer, model_name: str, state: bool) -> None:
    session = created(server, model_name)
    ahead = exported(server, model_name, **WITH_STATE) if state else exported(server, model_name)
    hook = add_hook(server, model_name, "clip_grad_norm", "step_pre", {"max_norm": 1.0})["id"]
    patch_group(server, model_name, 0, lr=0.25)
    session.push({"weight": np.full((4, 2), 3.0, np.float32)})
    answer = put(server, model_name, ahead)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told == {
        "timeline": 2,
        "effective_version": 2,
        "parameters": 4,
        "buffers": 0,
        "state": "replaced" if state else "begun_anew",
    }
    now = load(exported(server, model_name, **WITH_STATE))
    for name, tensor in load(ahead).items():
        assert torch.equal(now[name], tensor), name
    if not state:
        assert not now["optimizer.sum.table"].any()
        assert int(now["optimizer.step.table"]) == 0
    groups = server.rest("GET", f"/v1/models/{model_name}/param-groups").json()["param_groups"]
    assert groups[0]["lr"] == 0.25
    hooks = server.rest("GET", f"/v1/models/{model_name}/hooks").json()["hooks"]
    assert [held["id"] for held in hooks] == [hook]
    kinds = [
        event["kind"] for event in server.rest("GET", f"/v1/models/{model_name}/events").json()["events"]
    ]
    assert "imported" in kinds


def test_a_live_worker_is_told_and_goes_on(server: RunningServer, model_name: str) -> None:
    session = created(server, model_name)
    replaced(server, model_name, {name: torch.full(v.shape, 2.0) for name, v in PARAMETERS.items()})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        receipt = session.push({"bias": np.ones(4, np.float32)})
        assert receipt.outcome is Outcome.SUPERSEDED
        assert session.pull()["bias"].tolist() == [2.0] * 4
        assert session.push({"bias": np.ones(4, np.float32)}).outcome is Outcome.APPLIED
    assert told


@pytest.mark.parametrize("keep", [True, False])
def test_a_part_of_the_parameters(server: RunningServer, model_name: str, keep: bool) -> None:
    created(server, model_name)
    before = load(exported(server, model_name, **WITH_STATE))
    query = {"partial": "true", "keep_state": "true" if keep else "false"}
    told = replaced(server, model_name, {"bias": torch.arange(4.0)}, **query)
    assert told["state"] == ("kept" if keep else "begun_anew")
    now = load(exported(server, model_name, **WITH_STATE))
    moved = {name for name in before if not torch.equal(before[name], now[name])}
    anew = {f"optimizer.{state}.bias" for state in ("square_avg", "acc_delta", "step")}
    assert moved == {"bias"} | (set() if keep else anew)


def test_weights_only_leaves_the_state_of_a_file_out(server: RunningServer, model_name: str) -> None:
    session = created(server, model_name)
    ahead = exported(server, model_name, **WITH_STATE)
    session.push({name: np.ones(value.shape, np.float32) for name, value in PARAMETERS.items()})
    held = load(exported(server, model_name, **WITH_STATE))
    told = put(server, model_name, ahead, weights_only="true", keep_state="true").json()
    assert told["state"] == "kept"
    now = load(exported(server, model_name, **WITH_STATE))
    for name, tensor in now.items():
        assert torch.equal(tensor, (held if name.startswith("optimizer.") else load(ahead))[name]), name


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(3, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.outside = nn.Linear(3, 3, bias=False)
        self.outside.weight = self.inside.weight


def test_a_module_with_tied_weights_and_buffers(server: RunningServer, model_name: str) -> None:
    """From an export another model is made, which a worker with the same module attaches to."""
    module = Tied()
    with server.connect(model_name) as session:
        remote = session.attach(torch.optim.Adagrad(module.parameters(), lr=0.1), module=module)
        for _ in range(3):
            module.outside(module.norm(module.inside(torch.randn(4, 3)))).square().sum().backward()
            remote.step()
            remote.zero_grad()
        file = exported(server, model_name, **WITH_STATE)
    made = post(server, file, name=f"{model_name}-made")
    assert made.status_code == 201, made.text
    shown = {key: made.json()[key] for key in ("timeline", "version", "parameters", "groups", "workers_live")}
    assert shown == {"timeline": 1, "version": 0, "parameters": 3, "groups": 1, "workers_live": 0}
    assert load(exported(server, f"{model_name}-made", **WITH_STATE)).keys() == load(file).keys()
    other = Tied()
    with server.connect(f"{model_name}-made", "another") as session:
        remote = session.attach(torch.optim.Adagrad(other.parameters(), lr=0.1), module=other)
        assert remote.values_from == "server"
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, load(file)[name]), name
        held = remote.state_dict()["state"]
        assert torch.equal(held[0]["sum"], load(file)["optimizer.sum.inside.weight"])
        assert held[0]["step"] == 3
    # buffers come in, too, but only those that the model has
    changed = {**load(file), "norm.running_mean": torch.ones(3)}
    assert replaced(server, model_name, changed)["buffers"] == 3
    assert torch.equal(load(exported(server, model_name))["norm.running_mean"], torch.ones(3))
    twins = {**load(exported(server, model_name)), "outside.weight": torch.ones(3, 3)}
    with untouched(server, model_name):
        assert put(server, model_name, save(twins)).json()["code"] == "invalid_file"


# Models that are made of a file.

PLAIN = {"b": torch.ones(2), "a.w": torch.arange(6.0).view(2, 3), "a.n": torch.tensor(3)}
CHOICES: dict[str, tuple[list[dict[str, Any]], list[list[str]]]] = {
    "all": ([{"rule": "adagrad", "lr": 0.5}], [["a.w", "b"]]),
    "names in order": ([{"rule": "adagrad", "params": ["b", "a.w"]}], [["b", "a.w"]]),
    "the rest": ([{"rule": "adagrad", "params": ["b"]}, {"rule": "adadelta"}], [["b"], ["a.w"]]),
    "a pattern": ([{"rule": "keras_adagrad", "params": ["a.w*"]}], [["a.w"]]),
    "a name before a pattern": (
        [{"rule": "adagrad", "params": ["*[wb]"]}, {"rule": "adadelta", "params": ["b"]}],
        [["a.w"], ["b"]],
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_groups_choose_the_parameters(server: RunningServer, model_name: str, case: str) -> None:
    groups, chosen = CHOICES[case]
    made = post(server, save(PLAIN), name=model_name, groups=json.dumps(groups))
    assert made.status_code == 201, made.text
    shown = server.rest("GET", f"/v1/models/{model_name}/param-groups").json()["param_groups"]
    assert [sorted(group["params"]) for group in shown] == [sorted(names) for names in chosen]
    if case == "names in order":
        assert shown[0]["params"] == ["b", "a.w"]
    assert [group["rule"] for group in shown] == [group["rule"] for group in groups]
    held = load(exported(server, model_name))
    assert {name: tensor.tolist() for name, tensor in held.items()} == {
        name: tensor.tolist() for name, tensor in PLAIN.items()
    }


def test_every_dtype_of_parameters(server: RunningServer, model_name: str) -> None:
    """Also without elements, and infinite buffers beside them."""
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    values = {str(kind): torch.randn(5).to(kind) for kind in kinds}
    values |= {"none": torch.empty(0, 3), "mask": torch.tensor([-float("inf"), 0.0])}
    groups = [{"rule": "adadelta", "params": ["torch.*", "none"]}]
    assert post(server, save(values), name=model_name, groups=json.dumps(groups)).status_code == 201
    file = load(exported(server, model_name, **WITH_STATE))
    assert file["optimizer.acc_delta.torch.bfloat16"].dtype == torch.float32
    told = replaced(server, model_name, file)
    assert (told["parameters"], told["buffers"], told["state"]) == (5, 1, "replaced")
    now = load(exported(server, model_name, **WITH_STATE))
    assert all(torch.equal(now[name], tensor) for name, tensor in file.items())
    for kind in kinds:
        broken = {**values, str(kind): torch.full((5,), float("nan")).to(kind)}
        assert put(server, model_name, save(broken)).json()["code"] == "nonfinite_parameter"
    assert load(exported(server, model_name, **WITH_STATE)).keys() == now.keys()
    assert show_model(server, model_name)["timeline"] == 2


def test_a_model_with_more_names_than_a_short_header_holds(server: RunningServer, model_name: str) -> None:
    """What is exported comes back in, however many parameters it has."""
    many = {f"{number:05d}{'x' * 400}": np.zeros(1, np.float32) for number in range(7000)}
    server.connect(model_name).create(many, [{"rule": "adagrad", "params": list(many)}])
    file = exported(server, model_name, **WITH_STATE)
    assert int.from_bytes(file[:8], "little") > 10 * MIB
    assert put(server, model_name, file).json()["parameters"] == 7000
    refused = post(server, file, name=f"{model_name}-made")
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_file")


KERAS = {
    "keras_adagrad": ["accumulator"],
    "keras_adadelta": ["accumulated_delta_var", "accumulated_grad"],
}


@pytest.mark.parametrize("rule", KERAS)
def test_the_state_of_kerass_groups_has_kerass_names(
    server: RunningServer, model_name: str, rule: str
) -> None:
    session = server.connect(model_name)
    session.create({"w": np.ones(3, np.float32)}, [{"rule": rule, "params": ["w"]}])
    session.push({"w": np.ones(3, np.float32)})
    file = exported(server, model_name, **WITH_STATE)
    states = [f"optimizer.{state}.w" for state in KERAS[rule]]
    assert sorted(load(file)) == sorted([*states, "optimizer.step.w", "w"])
    assert post(server, file, name=f"{model_name}-made").status_code == 201
    made = load(exported(server, f"{model_name}-made", **WITH_STATE))
    for name, tensor in load(file).items():
        assert torch.equal(made[name], tensor), name


BAD_GROUPS: dict[str, tuple[Any, str]] = {
    "none": (None, "invalid_file"),
    "no list": ({}, "invalid_settings"),
    "empty": ([], "invalid_settings"),
    "no rule": ([{}], "invalid_settings"),
    "an unknown rule": ([{"rule": "sgd"}], "invalid_manifest"),
    "an unknown hyperparameter": ([{"rule": "adagrad", "momentum": 0.9}], "invalid_hyperparameter"),
    "a text for a number": ([{"rule": "adagrad", "lr": "1"}], "invalid_hyperparameter"),
    "a number of 400 digits": ([{"rule": "adagrad", "lr": 10**400}], "invalid_hyperparameter"),
    "NaN": ([{"rule": "adagrad", "lr": float("nan")}], "invalid_hyperparameter"),
    "a missing tensor": ([{"rule": "adagrad", "params": ["c"]}], "invalid_file"),
    "a tensor twice": ([{"rule": "adagrad", "params": ["b", "b"]}], "invalid_file"),
    "a pattern of nothing": ([{"rule": "adagrad", "params": ["c*"]}], "invalid_file"),
    "an integer": ([{"rule": "adagrad", "params": ["a.n"]}], "wrong_dtype"),
    "a second rest": ([{"rule": "adagrad"}, {"rule": "adagrad"}], "invalid_manifest"),
    "many patterns": ([{"rule": "adagrad", "params": ["*b"] * 101}], "invalid_settings"),
    "depth": ("[" * 5000, "invalid_settings"),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_groups_that_make_no_model(server: RunningServer, model_name: str, case: str) -> None:
    groups, code = BAD_GROUPS[case]
    text = groups if isinstance(groups, str) else json.dumps(groups)
    answer = post(server, save(PLAIN), name=model_name, **({} if groups is None else {"groups": text}))
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    assert server.rest("GET", f"/v1/models/{model_name}").status_code == 404


def test_a_name_that_is_taken_or_is_none(server: RunningServer, model_name: str) -> None:
    created(server, model_name)
    with untouched(server, model_name):
        assert post(server, b"", name=model_name).json()["code"] == "model_exists"
    assert post(server, b"", name="../x").json()["code"] == "invalid_name"
    assert server.rest("POST", "/v1/models", content=b"").json()["code"] == "invalid_settings"


def test_a_worker_that_withdraws_does_not_take_the_model_along(
    server: RunningServer, model_name: str
) -> None:
    assert post(server, save(PLAIN), name=model_name, groups='[{"rule": "adagrad"}]').status_code == 201
    wire = Wire(server.grpc)
    join = pb.JoinRequest(model=model_name, worker="w", attempt=7)
    (answer,) = wire.answers("Join", [join.SerializeToString()])
    identity = pb.JoinResponse.FromString(answer).member.identity
    leave = pb.LeaveRequest(model=model_name, identity=identity, attempt=7, undo=True)
    wire.answers("Leave", [leave.SerializeToString()])
    wire.close()
    assert show_model(server, model_name)["workers_live"] == 0


def test_a_made_model_and_an_import_outlive_the_server(data: Path) -> None:
    with running_server(data) as server:
        assert post(server, save(PLAIN), name="m", groups='[{"rule": "adagrad"}]').status_code == 201
        replaced(server, "m", {**PLAIN, "b": torch.tensor([7.0, 8.0])})
        before = exported(server, "m", **WITH_STATE)
    with running_server(data) as server:
        assert load(exported(server, "m", **WITH_STATE))["b"].tolist() == [7.0, 8.0]
        assert load(exported(server, "m", **WITH_STATE)).keys() == load(before).keys()


# Digests.


@pytest.fixture(scope="module")
def target(server: RunningServer) -> str:
    created(server, "imports-digests")
    return "imports-digests"


def test_the_digest_of_an_export_is_asked_for_and_verified(server: RunningServer, target: str) -> None:
    path = f"/v1/models/{target}/export"
    assert "repr-digest" not in server.rest("GET", path).headers
    assert "repr-digest" not in server.rest("GET", path, headers={"want-repr-digest": "sha-256=0"}).headers
    wants = {"want-repr-digest": "sha-512=3, sha-256=10"}
    whole = server.rest("GET", path, headers=wants)
    digest = f"sha-256=:{base64.b64encode(hashlib.sha256(whole.content).digest()).decode()}:"
    assert whole.headers["repr-digest"] == digest
    part = server.rest(
        "GET", path, headers={**wants, "range": "bytes=0-9", "if-range": whole.headers["etag"]}
    )
    assert (part.status_code, part.headers["repr-digest"]) == (206, digest)  # of the whole

    def sent(field: str) -> httpx.Response:
        return server.rest(
            "PUT", f"/v1/models/{target}/state-dict", content=whole.content, headers={"repr-digest": field}
        )

    with untouched(server, target):
        other = base64.b64encode(bytes(32)).decode()
        assert sent(f"sha-256=:{other}:").json()["code"] == "digest_mismatch"
        assert sent("sha-256=:AAAA:").json()["code"] == "invalid_settings"
    assert sent(digest).status_code == 200
    assert sent("sha-512=:AAAA:").status_code == 200


def test_a_parameter_with_the_name_of_a_state(server: RunningServer, model_name: str) -> None:
    values = {"w": torch.ones(2), "optimizer.sum.w": torch.ones(2)}
    groups = json.dumps([{"rule": "adagrad", "params": list(values)}])
    assert post(server, save(values), name=model_name, groups=groups).status_code == 201
    assert download(server, f"{model_name}/export", "safetensors")
    refused = server.rest("GET", f"/v1/models/{model_name}/export", params=WITH_STATE)
    assert refused.json()["code"] == "invalid_manifest"
    assert replaced(server, model_name, values)["parameters"] == 2
