"""What operators see of a job of two ranks: REST, metrics, commands. And that a server alone shows none of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_plain
from typer.testing import CliRunner, Result

from pushstep.client import Session
from pushstep.client.commands import app
from pushstep.proto.training_pb2 import DescribeRequest, JoinRequest
from pushstep.proto.training_pb2_grpc import TrainingServiceStub
from tests.support.ranks.group import RankGroup, running_ranks
from tests.support.servers.harness import RunningServer, running_server, wait_until

WORLD, STEPS = 2, 4
LIMIT = 64 << 20
WEIGHT = np.ones((20_000, 8), np.float32)
GRADIENT = {"weight": WEIGHT, "bias": np.ones(10, np.float32)}
Ran = Callable[..., Result]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGroup]:
    options = ("--durability", "durable", "--max-bytes", str(LIMIT), "--staging-bytes", str(LIMIT))
    with running_ranks(tmp_path_factory.mktemp("watched"), WORLD, *options) as ranks:
        train(ranks.leader.connect("flights", "w0"))
        yield ranks


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("alone")) as server:
        train(server.connect("flights", "w0"))
        yield server


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Ran:
    monkeypatch.setenv("COLUMNS", "240")
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def train(session: Session) -> None:
    session.create(GRADIENT)
    for _ in range(STEPS):
        session.exchange(GRADIENT)


def asked(server: RunningServer, path: str, status: int = 200, **query: Any) -> Any:
    answer = server.rest("GET", path, params=query)
    assert answer.status_code == status, answer.text
    return answer.json()


def scraped(server: RunningServer) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    metrics = parse_plain(server.rest("GET", "/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for metric in metrics for s in metric.samples}


def settled(group: RankGroup) -> dict[str, Any]:
    """The ranks, once each has taken every step."""
    wait_until(lambda: asked(group.leader, "/v1/shards")["ranks"][1]["versions_behind"] == 0, 60)
    found: dict[str, Any] = asked(group.leader, "/v1/shards")
    return found


def test_the_ranks_and_the_parts_of_models(group: RankGroup) -> None:
    found = settled(group)
    assert (found["world"], found["ready"], found["next"]) == (WORLD, True, None)
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert [rank["address"] for rank in found["ranks"]] == [rank.grpc for rank in group.ranks]
    (model,) = found["models"]
    held = [rank["bytes"]["held"] for rank in found["ranks"]]
    assert [part["bytes"] for part in model["shards"]] == held
    assert model["bytes"] == sum(held) == asked(group.leader, "/v1/models/flights")["bytes"]
    assert sum(part["elements"] for part in model["shards"]) == WEIGHT.size + 10
    assert sum(part["share"] for part in model["shards"]) == pytest.approx(1, abs=1e-5)
    assert [part["version"] for part in model["shards"]] == [STEPS] * WORLD
    assert model["skew"] == found["skew"] == pytest.approx(max(held) / (sum(held) / WORLD), abs=1e-4)
    with grpc.insecure_channel(group.leader.grpc) as channel:
        answer = TrainingServiceStub(channel).Join(JoinRequest(model="flights", worker="reader"))
    assert int(model["map_version"], 16) == answer.member.shards.version
    for rank in found["ranks"]:
        assert rank["state"] == "serving"
        assert rank["bytes"]["limit"] == rank["staging_bytes"]["limit"] == LIMIT
        assert rank["seconds"]["step"]["count"] == STEPS
        assert rank["seconds"]["step"]["sum"] > 0
        assert rank["seconds"]["journal"]["count"] >= STEPS
        assert rank["traffic_bytes"]["in"] > STEPS * WEIGHT.nbytes / WORLD * 0.9
        assert rank["pushes_staged"] == 0
        assert rank["snapshot_created"] > 1e9


def test_metrics_say_what_rest_says_of_each_rank(group: RankGroup) -> None:
    ranks, found = settled(group)["ranks"], scraped(group.leader)
    for rank in ranks:
        label = ("rank", str(rank["rank"]))
        assert found["pushstep_rank_link_up", (label,)] == 1
        assert found["pushstep_rank_behind_versions", (label,)] == 0
        assert found["pushstep_rank_figures_age_seconds", (label,)] < 30
        assert found["pushstep_rank_pushes_staged", (label,)] == 0
        for budget, field in {"models": "bytes", "staging": "staging_bytes", "reading": "read_bytes"}.items():
            of = (("budget", budget), label)
            assert found["pushstep_rank_budget_limit_bytes", of] == rank[field]["limit"]
            assert found["pushstep_rank_budget_used_bytes", of] == rank[field]["held"]
        assert found["pushstep_rank_steps_total", (label,)] == STEPS
        assert found["pushstep_rank_step_seconds_total", (label,)] == rank["seconds"]["step"]["sum"]
        assert found["pushstep_rank_journal_records_total", (label,)] >= STEPS
        at_s = found["pushstep_rank_snapshot_created_timestamp_seconds", (label,)]
        assert at_s == rank["snapshot_created"]
    of_ranks = [name for name, labels in found if name.startswith("pushstep_rank_")]
    assert len(of_ranks) == 17 * WORLD
    assert found["pushstep_ready", ()] == 1


def test_capacity_is_the_lowest_of_all_ranks(group: RankGroup) -> None:
    found = asked(group.leader, "/v1/capacity", model="flights", push_every_s=0.5)
    model, shards = found["model"], found["shards"]
    assert [shard["rank"] for shard in shards] == [0, 1]
    for shard in shards:
        assert shard["rates"]["ingest_bytes_per_s"] > 1e6
        assert set(shard["rates"]["step_elements_per_s"]) >= {"adadelta", "adagrad"}
        assert shard["memory_bytes"]["total"] > 0
    assert {**shards[0], "rates": None, "memory_bytes": None} == {
        **{name: found[name] for name in ("bytes", "staging_bytes", "read_bytes", "device")},
        "rank": 0,
        "state": "serving",
        "rates": None,
        "memory_bytes": None,
    }
    assert model["push_bytes"] == WEIGHT.nbytes + 40
    assert model["bound_rank"] in (0, 1)
    assert model["workers"] == min(model["bounds"].values()) == model["bounds"][model["bound_by"]]
    # each rank has about half of a push, and what is on its way to its place while it is read
    assert LIMIT >= model["bounds"]["staging"] * WEIGHT.nbytes / WORLD > LIMIT / 4


def test_a_rank_that_does_not_answer_is_shown_as_it_last_was(group: RankGroup) -> None:
    settled(group)
    frozen = group.ranks[1].process.pid
    group.ranks[1].process.send_signal(signal.SIGSTOP)
    try:
        found, metrics = asked(group.leader, "/v1/shards"), scraped(group.leader)
    finally:
        group.ranks[1].process.send_signal(signal.SIGCONT)
    assert group.ranks[1].process.pid == frozen
    rank = found["ranks"][1]
    assert rank["figures_age_s"] >= 1
    assert rank["seconds"]["step"]["count"] == STEPS
    assert metrics["pushstep_rank_figures_age_seconds", (("rank", "1"),)] > 1
    wait_until(lambda: asked(group.leader, "/v1/shards")["ranks"][1]["figures_age_s"] < 1, 60)
    assert asked(group.leader, "/readyz") == {"ready": True, "ranks_not_ready": {}}


def test_commands(group: RankGroup, run: Ran) -> None:
    shown = settled(group)
    answer = run("shards", "--server", group.leader.grpc)
    assert answer.exit_code == 0, answer.output
    for word in ("serving", "flights", group.ranks[1].grpc, "2 ranks, ready, skew 1."):
        assert word in answer.stdout
    as_json = run("shards", "--server", group.leader.grpc, "--json")
    assert json.loads(as_json.stdout)["models"] == shown["models"]
    for number, rank in enumerate(group.ranks):
        status = json.loads(run("status", rank.grpc, "--json").stdout)
        assert (status["rank"], status["ranks"], status["models"]) == (number, WORLD, ["flights"])
    assert json.loads(run("status", f"http://{group.leader.http}", "--json").stdout)["ranks"] == WORLD
    refused = run("shards", "--server", group.ranks[1].grpc)
    assert refused.exit_code != 0
    assert "this is rank 1" in refused.stderr
    with grpc.insecure_channel(group.ranks[1].grpc) as channel:
        assert TrainingServiceStub(channel).Describe(DescribeRequest()).http_url == ""


def test_a_server_alone_is_one_rank_and_shows_nothing_new(alone: RunningServer, run: Ran) -> None:
    found = asked(alone, "/v1/shards")
    (rank,), (model,) = found["ranks"], found["models"]
    assert (found["world"], found["ready"], found["skew"]) == (1, True, 1)
    assert (rank["address"], rank["state"]) == (alone.grpc, "serving")
    assert model["map_version"] is None
    assert model["bytes"] == rank["bytes"]["held"]
    assert model["shards"][0]["share"] == 1
    assert model["shards"][0]["version"] == STEPS
    assert asked(alone, "/readyz") == {"ready": True}
    assert asked(alone, "/v1")["ranks"] == 1
    assert "shards" not in asked(alone, "/v1/capacity")
    assert "pushstep_rank" not in alone.rest("GET", "/metrics").text
    assert "ranks" not in json.loads(run("status", alone.grpc, "--json").stdout)
    assert "1 rank, ready" in run("shards", "--server", alone.grpc).stdout
