"""POST .../param-groups: new parameters, stepped from then on, while the workers that are there go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from pushstep.proto.errors import ManifestMismatch
from tests.support.servers.harness import RunningServer, running_server, start_server
from tests.support.workers.wire import created, state_of, untouched

FORCE = {"force": "true"}
ONES = {"bias": np.ones(4, np.float32)}
HEAD: dict[str, Any] = {
    "rule": "adagrad",
    "lr": 0.5,
    "params": [
        {"name": "head.weight", "shape": [2, 3], "values": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]},
        {"name": "head.bias", "shape": [2], "dtype": "float16", "values": 0.25},
    ],
}


def add(server: RunningServer, model: str, status: int = 201, **options: Any) -> dict[str, Any]:
    answer = server.rest("POST", f"/v1/models/{model}/param-groups", **options)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_group_is_added_in_json_and_stepped(server: RunningServer, model_name: str) -> None:
    owner = created(server, model_name)
    etag = server.rest("GET", f"/v1/models/{model_name}/param-groups").headers["etag"]
    assert add(server, model_name, 409, json=HEAD)["code"] == "workers_live"
    made = add(server, model_name, json=HEAD, headers={"If-Match": etag}, params=FORCE)
    assert (made["index"], made["rule"], made["lr"], made["params_total"]) == (2, "adagrad", 0.5, 2)
    assert (made["effective_version"], made["workers_told"]) == (2, ["owner"])
    values = owner.pull()
    assert values["head.weight"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    owner.push(ONES)  # joins again
    receipt = owner.push({"head.weight": np.ones((2, 3), np.float32), **ONES})
    assert (receipt.version, receipt.effective_lr[2]) == (3, 0.5)
    twin = torch.arange(6, dtype=torch.float32).view(2, 3).requires_grad_()
    twin.grad = torch.ones(2, 3)
    torch.optim.Adagrad([twin], lr=0.5).step()
    assert torch.allclose(torch.from_numpy(owner.pull()["head.weight"]), twin, rtol=1e-6)
    late = {**HEAD, "params": [{"name": "late", "shape": []}]}
    add(server, model_name, 412, json=late, headers={"If-Match": etag}, params=FORCE)


def test_a_group_is_added_with_the_values_of_a_file(server: RunningServer, model_name: str) -> None:
    owner = created(server, model_name)
    values = {"a": np.arange(6, dtype=np.float32).reshape(3, 2), "b": np.full(3, 0.5, np.float16)}
    group = '{"rule": "adadelta", "lr": 2.0, "params": ["b", "a"]}'
    headers = {"content-type": "application/octet-stream"}
    made = add(server, model_name, content=save(values), params={"group": group, **FORCE}, headers=headers)
    assert made["params"] == ["b", "a"]
    found = owner.pull()
    for name, value in values.items():
        assert found[name].tobytes() == value.tobytes()


def test_an_attached_loop_goes_on_once_it_has_the_group(server: RunningServer, model_name: str) -> None:
    module = torch.nn.Linear(2, 1)
    session = server.connect(model_name)
    optimizer = session.attach(torch.optim.Adagrad(module.parameters(), lr=0.1), module=module)

    def step() -> Any:
        optimizer.zero_grad()
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return optimizer.last_receipt

    step()
    late = {"rule": "adagrad", "lr": 0.5, "params": [{"name": "late", "shape": [2], "values": [3.0, 4.0]}]}
    assert add(server, model_name, json=late, params=FORCE)["workers_live"] == 1
    before = module.weight.detach().clone()
    with pytest.raises(ManifestMismatch, match="late"):
        step()
    assert torch.equal(before, module.weight)
    parameter = torch.nn.Parameter(torch.zeros(2))
    module.register_parameter("late", parameter)
    optimizer.add_param_group({"params": [parameter], "lr": 0.5})
    assert step().version == 2
    assert parameter.tolist() == [3.0, 4.0]
    assert not torch.equal(before, module.weight)


@pytest.mark.parametrize("level", ["applied", "everysec", "durable"])
def test_an_added_group_is_kept_before_it_is_answered(level: str, data: Path) -> None:
    """A crash right behind the answer loses nothing, at any level: workers and operators go by the new manifest."""
    server = start_server(data, "--durability", level)
    created(server, "m")
    made = add(server, "m", json=HEAD, params=FORCE)
    before = state_of(server, "m")
    server.kill()
    with running_server(data) as again:
        after = state_of(again, "m")
        differs = {key for key in before if before[key] != after[key]}
        # the ETags of the groups name the timeline, and a crash at `applied` begins one
        assert differs == ({"timeline", "groups"} if level == "applied" else set())
        shown = again.rest("GET", "/v1/models/m/param-groups/2").json()
        assert shown["params"] == made["params"]
        assert (shown["etag"] == made["etag"]) == (level != "applied")


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_an_added_group_outlasts_the_server(how: str, data: Path) -> None:
    server = start_server(data, "--durability", "durable")
    owner = created(server, "m")
    made = add(server, "m", json=HEAD, params=FORCE)
    owner.push(ONES)
    owner.push({"head.bias": np.ones(2, np.float32), **ONES})
    before = state_of(server, "m")
    if how == "stop":
        assert server.stop() == 0
    else:
        server.kill()
    with running_server(data) as again:
        after = state_of(again, "m")
        assert [key for key in before if before[key] != after[key]] == []
        shown = again.rest("GET", "/v1/models/m/param-groups/2").json()
        assert (shown["params"], shown["etag"]) == (made["params"], made["etag"])


def parameter(**changes: Any) -> dict[str, Any]:
    return {"rule": "adagrad", "params": [{"name": "n", "shape": [2], **changes}]}


BAD = {
    "no rule": ({**HEAD, "rule": "sgd"}, 422, "invalid_manifest"),
    "no parameters": ({**HEAD, "params": []}, 422, "invalid_settings"),
    "a name that is taken": (parameter(name="bias"), 422, "invalid_manifest"),
    "a name twice": ({**HEAD, "params": [HEAD["params"][0]] * 2}, 422, "invalid_manifest"),
    "a bad name": (parameter(name="a\nb"), 422, "invalid_text"),
    "no dtype": (parameter(dtype="int64"), 422, "wrong_dtype"),
    "a negative lr": ({**HEAD, "lr": -1.0}, 422, "invalid_hyperparameter"),
    "no hyperparameter": ({**HEAD, "momentum": 0.5}, 422, "invalid_hyperparameter"),
    "values of another shape": (parameter(values=[1.0]), 422, "invalid_settings"),
    "ragged values": (parameter(values=[[1.0], 2.0]), 422, "invalid_settings"),
    "texts for values": (parameter(values=["x", "y"]), 422, "invalid_settings"),
    "too large for its dtype": (parameter(values=1e308), 422, "nonfinite_parameter"),
    "a negative dimension": (parameter(shape=[-1]), 422, "invalid_settings"),
    "more elements than there may be": (parameter(shape=[2**40, 2**40]), 422, "invalid_manifest"),
    "more than there is room for": (parameter(shape=[2**44]), 409, "over_capacity"),
    "a list": ([], 422, "invalid_settings"),
}


@pytest.mark.parametrize("body, status, code", BAD.values(), ids=BAD)
def test_a_bad_group_is_refused_by_name(
    body: Any, status: int, code: str, server: RunningServer, model_name: str
) -> None:
    created(server, model_name)
    with untouched(server, model_name):
        for query in (FORCE, {**FORCE, "dry_run": "true"}):
            answer = server.rest("POST", f"/v1/models/{model_name}/param-groups", json=body, params=query)
            assert (answer.status_code, answer.json()["code"]) == (status, code)


FILES = {
    "no file": (b"x", '{"rule": "adagrad"}', "invalid_file"),
    "no group": (save({"n": np.zeros(2, np.float32)}), "", "invalid_settings"),
    "two": (
        save({"n": np.zeros(2, np.float32)}),
        '{"rule": "adagrad"}, {"rule": "adagrad"}',
        "invalid_settings",
    ),
    "NaN": (save({"n": np.full(2, np.nan, np.float32)}), '{"rule": "adagrad"}', "nonfinite_parameter"),
    "more than the group": (
        save({"n": np.zeros(2, np.float32), "o": np.zeros(2, np.float32)}),
        '{"rule": "adagrad", "params": ["n"]}',
        "invalid_file",
    ),
}


@pytest.mark.parametrize("content, group, code", FILES.values(), ids=FILES)
def test_a_bad_file_is_refused_by_name(
    content: bytes, group: str, code: str, server: RunningServer, model_name: str
) -> None:
    created(server, model_name)
    with untouched(server, model_name):
        answer = server.rest(
            "POST", f"/v1/models/{model_name}/param-groups", content=content, params={"group": group, **FORCE}
        )
        assert (answer.status_code, answer.json()["code"]) == (422, code)
