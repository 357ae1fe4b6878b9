"""GET /v1/capacity: measured rates, and how many workers of a model they are enough for."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.support.servers.harness import RunningServer
from tests.support.servers.operators import take_snapshot
from tests.support.workers.wire import created, untouched


def ask(server: RunningServer, status: int = 200, **query: Any) -> dict[str, Any]:
    answer = server.rest("GET", "/v1/capacity", params=query)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_rates_are_measured_once_and_not_in_the_writer(server: RunningServer, model_name: str) -> None:
    created(server, model_name)
    take_snapshot(server, model_name)
    with untouched(server, model_name):
        first, second = ask(server), ask(server)
    rates = first["rates"]
    assert rates["ingest_bytes_per_s"] > 1e6
    assert set(rates["step_elements_per_s"]) >= {"adadelta", "adagrad"}
    assert all(rate > 1e5 for rate in rates["step_elements_per_s"].values())
    assert rates["snapshot_bytes_per_s"] > 0
    assert {**second["rates"], "age_s": 0} == {**rates, "age_s": 0}
    assert 0 < first["memory_bytes"]["available"] <= first["memory_bytes"]["total"]
    assert first["staging_bytes"]["held"] <= first["staging_bytes"]["limit"]
    assert "model" not in first


def test_the_workers_of_a_model_follow_from_what_is_shown(server: RunningServer, model_name: str) -> None:
    created(server, model_name)
    shown = ask(server, model=model_name, push_every_s=0.5)
    model, rates = shown["model"], shown["rates"]
    assert model["push_bytes"] == 4 * 28
    assert model["step_s"] > 0
    push_s = max(model["push_bytes"] / rates["ingest_bytes_per_s"], model["step_s"], 1e-9)
    assert model["pushes_per_s"] == pytest.approx(1 / push_s, rel=0.01)
    assert model["bounds"]["rate"] == pytest.approx(math.floor(0.5 / push_s), rel=0.01, abs=1)
    assert model["bounds"]["staging"] == shown["staging_bytes"]["limit"] // 112
    assert model["bounds"]["table"] == 10_000
    assert model["workers"] == min(model["bounds"].values()) == model["bounds"][model["bound_by"]]


BAD = {"nothing": "", "zero": "0", "infinite": "inf", "NaN": "nan", "too long": "1e7", "negative": "-0.0"}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_bad_interval_is_refused(text: str, server: RunningServer) -> None:
    assert ask(server, 422, push_every_s=text)["code"] == "invalid_settings"


def test_a_model_that_is_not_there(server: RunningServer) -> None:
    assert ask(server, 404, model="nothing")["code"] == "unknown_model"
