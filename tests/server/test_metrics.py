"""/metrics: what it says is what REST says, in both formats; its labels are bounded; a scrape disturbs nobody."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import NonfiniteGradient, PushstepError
from pushstep.proto.shards_pb2 import RankFigures
from pushstep.proto.types_pb2 import Identity
from pushstep.server.config import Config
from pushstep.server.counters.histogram import Histogram
from pushstep.server.metrics import disk
from pushstep.server.metrics.disk import DiskWatch
from pushstep.server.metrics.exposition import OPEN_METRICS, PLAIN, Collector, accepts_open_metrics
from pushstep.server.models.catalog import Catalog
from pushstep.server.models.model import Model
from pushstep.server.reports.job_view import RankRow, RankState
from tests.support.servers.driven import Pusher, made
from tests.support.servers.harness import RunningServer, running_server
from tests.support.source_tree import ROOT
from tests.support.workers.wire import Wire

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
GRADIENT = {"weight": np.ones(4, dtype=np.float32)}
WORKERS = ("w0", "w1", "w2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server on which three workers have trained, two over TCP and one through shared memory."""
    data = tmp_path_factory.mktemp("metrics") / "data"
    with running_server(data, "--durability", "durable", "--max-models", "3") as server:
        sessions = [server.connect("flights", name, shared_memory=name == "w2") for name in WORKERS]
        for session in sessions:
            session.create(GRADIENT)
        for _ in range(5):
            for session in sessions:
                session.exchange(GRADIENT)
        for _ in range(2):
            with pytest.raises(NonfiniteGradient):
                sessions[0].push({"weight": np.full(4, np.nan, dtype=np.float32)})
        sessions[1].pull()
        sessions[1].upload(GRADIENT)
        yield server


def scraped(server: RunningServer) -> Samples:
    return samples(list(parse_plain(server.rest("GET", "/metrics").text)))


def samples(metrics: list[Metric]) -> Samples:
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for metric in metrics for s in metric.samples}


def of_flights(found: Samples, name: str, **labels: str) -> float:
    return found[name, tuple(sorted({"model": "flights", **labels}.items()))]


# --- what it says


def test_the_page_lists_what_is_exposed(trained: RunningServer) -> None:
    """Each metric with its kind, its unit, its labels and the question that it answers."""
    page = (ROOT / "deploy" / "METRICS.md").read_text()
    row = re.compile(r"^\| `(pushstep_\w+)` \| (\w+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.M)
    listed = {
        name: (kind, unit, labels, question) for name, kind, unit, labels, question in row.findall(page)
    }
    exposed = {}
    collector = Collector(Catalog(Config(data=trained.data)))
    collector.ranks = [RankRow(0, RankState.SERVING, figures=RankFigures(snapshot_created_s=1.0))]
    for metric in collector.collect():
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        exposed[name] = metric
    for metric in parse_plain(trained.rest("GET", "/metrics").text):
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        assert name in exposed, name
        assert metric.documentation == exposed[name].documentation
        exposed[name] = metric
    own = {name: metric for name, metric in exposed.items() if not name.startswith("process_")}
    assert listed.keys() == own.keys()
    for name, metric in own.items():
        kind, unit, labels, question = listed[name]
        assert (kind, question) == (metric.type, metric.documentation)
        assert "?" in question
        for word in ("seconds", "bytes", "versions"):
            assert (f"_{word}" in name) <= unit.startswith(word), name
        seen = {label for s in metric.samples for label in s.labels if label != "le"}
        assert seen <= set(re.findall(r"`(\w+)`", labels)), name
    for name in exposed.keys() - own.keys():
        assert f"`{name}`" in page


def test_it_says_what_rest_says(trained: RunningServer) -> None:
    found = scraped(trained)
    model = trained.rest("GET", "/v1/models/flights").json()
    workers = trained.rest("GET", "/v1/models/flights/workers").json()["workers"]
    events = [e["kind"] for e in trained.rest("GET", "/v1/models/flights/events").json()["events"]]
    capacity = trained.rest("GET", "/v1/capacity").json()
    for outcome in ("applied", "rejected", "skipped"):
        told = sum(worker["outcomes"].get(outcome, 0) for worker in workers)
        assert of_flights(found, "pushstep_pushes_total", outcome=outcome) == told
    assert of_flights(found, "pushstep_pushes_total", outcome="applied") == 16 == model["version"]
    assert of_flights(found, "pushstep_pushes_total", outcome="rejected") == 2
    assert of_flights(found, "pushstep_push_refusals_total", code="nonfinite_gradient") == 2
    assert of_flights(found, "pushstep_push_duplicates_total") == sum(w["duplicates"] for w in workers)
    assert of_flights(found, "pushstep_version") == of_flights(found, "pushstep_durable_version") == 16
    assert of_flights(found, "pushstep_timeline") == model["timeline"]
    assert of_flights(found, "pushstep_workers", state="live") == model["workers_live"] == 3
    assert of_flights(found, "pushstep_worker_lag_versions") == max(w["lag"] for w in workers)
    for kind in set(events):
        assert of_flights(found, "pushstep_events_total", kind=kind) == events.count(kind)
    kept = sum(of_flights(found, "pushstep_model_bytes", of=of) for of in ("parameters", "state", "extras"))
    assert kept == model["bytes"] == capacity["bytes"]["held"]
    assert found["pushstep_budget_limit_bytes", (("budget", "models"),)] == capacity["bytes"]["limit"]
    assert found["pushstep_models", ()] == 1
    assert found["pushstep_models_limit", ()] == 3
    assert of_flights(found, "pushstep_pulls_total") == 1
    assert of_flights(found, "pushstep_snapshot_version") == 0
    assert of_flights(found, "pushstep_snapshot_bytes") > 0
    assert 0 <= time.time() - of_flights(found, "pushstep_snapshot_created_timestamp_seconds") < 100


def test_each_room_counts_each_push(trained: RunningServer) -> None:
    found = scraped(trained)
    times = {"receive": 17, "wait": 17, "queue": 15, "step": 15, "publish": 15}
    for room, pushes in times.items():
        assert of_flights(found, "pushstep_push_seconds_count", room=room) == pushes, room
        assert of_flights(found, "pushstep_push_seconds_bucket", room=room, le="+Inf") == pushes
        assert 0 <= of_flights(found, "pushstep_push_seconds_sum", room=room) < 10
    # beside the pushes: joins and the upload
    records = of_flights(found, "pushstep_journal_records_total")
    assert records == of_flights(found, "pushstep_push_seconds_count", room="journal") >= 18
    assert of_flights(found, "pushstep_journal_sync_seconds_count") > 0
    assert (
        0
        < of_flights(found, "pushstep_journal_file_bytes")
        <= 4096 + of_flights(found, "pushstep_journal_appended_bytes_total")
    )
    assert of_flights(found, "pushstep_push_staleness_versions_count") == 15


def test_bytes_by_the_way_that_they_took(trained: RunningServer) -> None:
    found = scraped(trained)

    def carried(direction: str, transport: str) -> float:
        return found["pushstep_traffic_bytes_total", (("direction", direction), ("transport", transport))]

    body = GRADIENT["weight"].nbytes
    assert carried("in", "shared_memory") == 5 * body
    assert carried("out", "shared_memory") >= 5 * body
    assert carried("in", "tcp") > 13 * body
    assert carried("out", "tcp") > 11 * body
    assert carried("out", "http") > 0


@pytest.mark.parametrize(
    ("accept", "is_open"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain;version=0.0.4;q=0.5", False),
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", True),
        ("application/openmetrics-text", True),
        ("text/plain, application/openmetrics-text ; q=0", False),
        ("application/openmetrics-text;version=\u00b2;escaping=x\u00ff", True),
        (",;,;;=", False),
    ],
)
def test_the_format_is_the_one_that_is_accepted(trained: RunningServer, accept: str, is_open: bool) -> None:
    assert accepts_open_metrics(accept) is is_open
    answer = trained.rest("GET", "/metrics", headers=[(b"accept", accept.encode("latin-1"))])
    assert answer.status_code == 200
    assert answer.headers["content-type"] == (OPEN_METRICS if is_open else PLAIN)
    parse: Any = parse_open_metrics if is_open else parse_plain
    assert of_flights(samples(list(parse(answer.text))), "pushstep_version") == 16


# --- labels


HOSTILE = ('"} 1\npushstep_forged 1', "a\\b", "x" * 100, "\u202enever-there", "../never-there", "never-there")


def test_a_name_that_was_refused_is_no_label(trained: RunningServer) -> None:
    wire = Wire(trained.grpc)
    for name in HOSTILE:
        assert trained.rest("GET", f"/v1/models/{quote(name, safe='')}").status_code == 404
        wire.refused("Pull", [pb.PullRequest(model=name).SerializeToString()])
        wire.refused("Join", [pb.JoinRequest(model="flights", worker=f"{name} ").SerializeToString()])
        header = pb.PushHeader(model=name, identity=Identity(worker=name, model_uid=b"x"))
        wire.refused("Push", [pb.PushRequest(header=header).SerializeToString()])
    wire.close()
    after = trained.rest("GET", "/metrics").text
    assert "never-there" not in after
    assert "forged" not in after
    assert set(re.findall(r'model="([^"]*)"', after)) == {"flights"}
    refused = {
        labels: n for (name, labels), n in scraped(trained).items() if name == "pushstep_refusals_total"
    }
    assert (
        refused[("code", "unknown_model"), ("door", "operators")] == len(HOSTILE) - 1
    )  # ".." is another path
    assert sum(n for labels, n in refused.items() if ("door", "workers") in labels) >= 3 * len(HOSTILE)


def test_a_deleted_model_s_series_end(trained: RunningServer) -> None:
    with trained.connect("brief", "w9") as session:
        session.create(GRADIENT)
        assert 'model="brief"' in trained.rest("GET", "/metrics").text
        assert trained.rest("DELETE", "/v1/models/brief").status_code == 204
    assert "brief" not in trained.rest("GET", "/metrics").text


def collector(data: Path) -> Collector:
    """Over three models of a catalog in this process, which serves nobody."""
    catalog = Catalog(Config(data=data))
    for number in range(3):
        catalog.models[f"m{number}"] = made()
    return Collector(catalog)


def test_ten_thousand_workers_make_no_series(tmp_path: Path) -> None:
    async def scenario() -> None:
        scrape = collector(tmp_path)
        models = list(scrape.catalog.models.values())
        for model in models:
            model.sessions.max_workers = 10_000
            model.sessions.join("w", 0.0, takeover=False)
        few = samples(list(scrape.collect()))
        for number in range(9_999):
            models[0].sessions.workers[f"w{number}"] = type(models[0].sessions.workers["w"])(f"w{number}")
        many = samples(list(scrape.collect()))
        assert few.keys() == many.keys()
        assert many["pushstep_workers", (("model", "m0"), ("state", "left"))] == 9_999
        for model in models:
            await model.close()

    asyncio.run(scenario())


# --- nobody is disturbed


def test_a_scrape_waits_for_no_writer(tmp_path: Path) -> None:
    async def scenario() -> None:
        scrape = collector(tmp_path)
        model = scrape.catalog.models["m0"]
        pusher, go_on = Pusher(model), threading.Event()
        held = model.writer.submit(go_on.wait)
        try:
            found = samples(list(scrape.collect()))
        finally:
            go_on.set()
            await held
        assert found["pushstep_workers", (("model", "m0"), ("state", "live"))] == 1
        assert pusher.sequence == 0
        for each in scrape.catalog.models.values():
            await each.close()

    asyncio.run(scenario())


def test_models_may_come_and_go_during_a_scrape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        scrape = collector(tmp_path)
        models, extra = scrape.catalog.models, made()
        kept = list(models.values())

        def moves(model: Model) -> int:
            """Whatever is read, a model has come or gone meanwhile."""
            models.pop("m9") if "m9" in models else models.update(m9=extra)
            return 1

        monkeypatch.setattr(Model, "held_bytes", property(moves))
        found = samples(list(scrape.collect()))
        assert found["pushstep_budget_used_bytes", (("budget", "models"),)] >= 3
        for each in (*kept, extra):
            await each.close()

    asyncio.run(scenario())


def test_a_disk_that_hangs_holds_up_no_scrape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch, answers, asked = DiskWatch(tmp_path), threading.Event(), []
    watch.ask(10.0)
    known = watch.found
    assert known is not None
    real = os.statvfs

    def hangs(path: Path) -> os.statvfs_result:
        asked.append(path)
        assert answers.wait(60)
        return real(path)

    monkeypatch.setattr(disk.os, "statvfs", hangs)
    for _ in range(3):
        watch.ask(0.001)
        assert watch.found is known
    assert len(asked) == 1
    answers.set()
    watch.ask(10.0)
    assert watch.found is not known


def test_a_failed_step_counts_as_rejected_everywhere(tmp_path: Path) -> None:
    async def scenario() -> None:
        model = made()
        pusher = Pusher(model)
        await pusher.push({"a": torch.ones(2)})

        def broken(*_: object) -> None:
            raise RuntimeError("the kernel")

        model.arenas.step = broken  # type: ignore[method-assign, assignment]
        with pytest.raises(PushstepError):
            await pusher.push({"a": torch.ones(2)})
        catalog = Catalog(Config(data=tmp_path))
        catalog.models["m"] = model
        found = samples(list(Collector(catalog).collect()))
        worker = model.sessions.workers["w"]
        for outcome in ("applied", "rejected"):
            labels = (("model", "m"), ("outcome", outcome))
            assert found["pushstep_pushes_total", labels] == worker.outcomes[outcome] == 1
        await model.close()

    asyncio.run(scenario())


def test_buckets_hold_their_bounds() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5, float("inf")):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 2]
    assert histogram.count == 6
