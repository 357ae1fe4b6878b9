"""The dashboard and the alerts, each query of them asked of a real Prometheus that has scraped a training."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from pushstep.client import Session
from pushstep.proto.errors import CATALOGUE, NonfiniteGradient
from tests.support.ranks.group import running_ranks
from tests.support.servers.harness import RunningServer, running_server, wait_until
from tests.support.servers.operators import set_policy, take_snapshot
from tests.support.source_tree import ROOT, python_files

pytestmark = pytest.mark.prometheus
DEPLOY = ROOT / "deploy"
CONFIGS = {name: DEPLOY / "prometheus" / f"{name}.yml" for name in ("prometheus", "prometheus.tls")}
ALERTS_FILE = DEPLOY / "prometheus" / "alerts.yml"
RULES = [rule for group in yaml.safe_load(ALERTS_FILE.read_text())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES}
DASHBOARD = json.loads((DEPLOY / "grafana" / "pushstep.json").read_text())
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for row in DASHBOARD["panels"]
    for panel in (row, *row.get("panels", ()))
    for target in panel.get("targets", ())
]
GRADIENT = {"weight": np.ones(4, dtype=np.float32)}


class Prometheus:
    """A Prometheus process that scrapes one server all the time."""

    def __init__(self, folder: Path, *targets: str, name: str = "prometheus") -> None:
        """Scrapes `targets` as one of the configurations says; its secrets are in the folder."""
        text = CONFIGS[name].read_text().replace("/run/secrets", str(folder))
        config = {
            **yaml.safe_load(text),
            "global": {"scrape_interval": "100ms", "scrape_timeout": "100ms", "evaluation_interval": "1h"},
            "rule_files": [str(ALERTS_FILE)],
        }
        (job,) = config["scrape_configs"]
        config["scrape_configs"] = [{**job, "static_configs": [{"targets": [*targets]}]}]
        file = folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        self.log = folder / "prometheus.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}",
                 "--web.listen-address=127.0.0.1:0"],
                stdout=log, stderr=log,
            )  # fmt: skip
        self.client = httpx.Client(trust_env=False, timeout=20)
        wait_until(lambda: self._address() is not None, 60)
        self.client.base_url = f"http://{self._address()}"
        wait_until(lambda: self.client.get("/-/ready").status_code == 200, 60)

    def _address(self) -> str | None:
        if self.process.poll() is not None:
            raise AssertionError(self.log.read_text())
        found = re.search(r'msg="Listening on" address=(\S+)', self.log.read_text())
        return None if found is None else found[1]

    def ask(self, query: str) -> list[dict[str, Any]]:
        answer = self.client.get("/api/v1/query", params={"query": query}).json()
        assert answer["status"] == "success", answer
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.client.close()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("watching")
    durable = ("--durability", "durable")
    with (
        running_server(folder / "data", *durable) as server,
        running_ranks(folder / "job", 2, *durable) as job,
    ):
        watching = Prometheus(folder, server.http, job.leader.http)
        try:
            train_in_ranks(job.leader, watching)
            train(server, watching)
            yield watching
        finally:
            watching.end()


def train_in_ranks(leader: RunningServer, watching: Prometheus) -> None:
    """Pushes between two scrapes, of which each rank has a part."""
    gradient = {"weight": np.ones(20_000, dtype=np.float32)}
    session = leader.connect("cut", "w0")
    session.create(gradient)
    for steps in (1, 2):
        session.exchange(gradient)
        counted = f"count(pushstep_rank_steps_total == {steps}) == 2"
        wait_until(partial(watching.ask, counted), 60)


def train(server: RunningServer, watching: Prometheus) -> None:
    """Two workers, rounds, a snapshot, refused pushes: so that whatever counts has counted between two scrapes."""
    session, other = server.connect("flights", "w0"), server.connect("flights", "w1", shared_memory=True)
    session.create(GRADIENT)
    other.create(GRADIENT)
    set_policy(server, "flights", policy="sync", quorum=1)
    once_more(server, session, other)
    seen = 'pushstep_push_refusals_total{code="nonfinite_gradient"}'
    wait_until(lambda: watching.ask(f"{seen} == 1"), 60)
    once_more(server, session, other)
    take_snapshot(server, "flights")
    once_more(server, session, other)
    wait_until(lambda: watching.ask(f"count_over_time(({seen} == 3)[1m:100ms]) >= 3"), 60)


def once_more(server: RunningServer, session: Session, other: Session) -> None:
    session.exchange(GRADIENT)
    other.exchange(GRADIENT)
    with pytest.raises(NonfiniteGradient):
        session.push({"weight": np.full(4, np.nan, dtype=np.float32)})
    assert server.rest("GET", "/v1/models/nobody").status_code == 404


@pytest.mark.parametrize("query", QUERIES)
def test_each_query_of_the_dashboard_has_an_answer(prometheus: Prometheus, query: str) -> None:
    for variable, value in {"$__rate_interval": "1m", "$instance": ".*", "$model": ".*"}.items():
        query = query.replace(variable, value)
    assert "$" not in query
    found = prometheus.ask(query)
    assert any(math.isfinite(float(series["value"][1])) for series in found), found


def test_the_dashboard_s_variables_have_values(prometheus: Prometheus) -> None:
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((\w+)(\{.*\})?, (\w+)\)", variable["definition"])
            assert match is not None
            assert prometheus.ask(f'{match[1]}{{{match[3]}!=""}}')
    assert {variable["name"] for variable in DASHBOARD["templating"]["list"]} == {
        "source",
        "instance",
        "model",
    }


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_looks_at_what_is_there(prometheus: Prometheus, alert: str) -> None:
    """Without its thresholds, and without the codes and kinds that only trouble has, each has a value."""
    expression = re.sub(r"\b(code|kind)(=~|!~|=)\"[^\"]*\"", "", ALERTS[alert]["expr"])
    expression = re.sub(r"(==|>|<) ([\d.]+)(?= *(\)|$|\n))", ">= bool 0", expression)
    found = prometheus.ask(expression)
    assert any(math.isfinite(float(series["value"][1])) for series in found), expression


def test_a_healthy_training_wakes_nobody(prometheus: Prometheus) -> None:
    """But for what the training has been made to do."""
    provoked = {"PushstepStepsRefused"}
    firing = {alert for alert, rule in ALERTS.items() if prometheus.ask(rule["expr"])}
    # of the disk that the test runs on nothing is known, nor of who else takes its cores; rates are over some seconds only
    assert firing - provoked <= {"PushstepDiskNearlyFull", "PushstepEventLoopLag"}


def test_alerts_name_codes_and_events_that_exist() -> None:
    text = ALERTS_FILE.read_text()
    source = "".join(path.read_text() for path in python_files("server"))
    named = [
        (match[1], match[2].split("|")) for match in re.finditer(r"\b(code|kind)[=!]~?\"([^\"]*)\"", text)
    ]
    assert named
    for label, words in named:
        for word in words:
            assert word in CATALOGUE if label == "code" else f'"{word}"' in source, word
    assert all({"summary", "action"} <= rule["annotations"].keys() for rule in RULES)
    assert {rule["labels"]["severity"] for rule in RULES} == {"page", "ticket"}


def test_the_two_configurations_differ_in_how_they_ask() -> None:
    plain, secured = (yaml.safe_load(path.read_text()) for path in CONFIGS.values())
    (job,) = secured["scrape_configs"]
    assert [job.pop(key) for key in ("scheme", "tls_config", "authorization")]
    assert secured == plain


def test_promtool_finds_no_fault() -> None:
    for command in (["rules", ALERTS_FILE], ["config", CONFIGS["prometheus"]]):
        subprocess.run(["promtool", "check", *map(str, command)], check=True, capture_output=True)


def series(name: str, values: str, labels: str = 'model="m"') -> dict[str, str]:
    return {
        "series": f'{name}{{instance="i",job="pushstep"{"," if labels else ""}{labels}}}',
        "values": values,
    }


def per_bucket(name: str, slow: str, labels: str) -> list[dict[str, str]]:
    """A histogram all of whose values lie above its bound 1024 or 10."""
    return [series(f"{name}_bucket", values, f'{labels}le="{le}"') for le, values in
            (("0.1", "0x60"), ("100", slow), ("1024", slow), ("+Inf", slow))]  # fmt: skip


# For each alert, what makes it fire within the hour, one value each minute.
TROUBLE: dict[str, list[dict[str, str]]] = {
    "PushstepDown": [series("up", "0x60", "")],
    "PushstepNotReady": [series("pushstep_ready", "0x60", "")],
    "PushstepRankMissing": [series("pushstep_rank_link_up", "0x60", 'rank="1"')],
    "PushstepModelNotLoaded": [series("pushstep_models_not_loaded", "1x60", "")],
    "PushstepModelFailed": [series("pushstep_model_failed", "1x60")],
    "PushstepNoPushes": [
        series("pushstep_pushes_total", "7x60", 'model="m",outcome="applied"'),
        series("pushstep_workers", "2x60", 'model="m",state="live"'),
    ],
    "PushstepStepsRefused": [
        series("pushstep_push_refusals_total", "0+60x60", 'model="m",code="nonfinite_gradient"')
    ],
    "PushstepWorkerQuarantined": [series("pushstep_workers_quarantined", "1x60")],
    "PushstepWorkerLost": [series("pushstep_events_total", "0+1x60", 'model="m",kind="worker_expired"')],
    "PushstepStalenessHigh": per_bucket("pushstep_push_staleness_versions", "0+60x60", 'model="m",'),
    "PushstepRoundsTimeOut": [
        series("pushstep_rounds_total", "0+10x60", 'model="m",closed_by="timeout"'),
        series("pushstep_rounds_total", "0+10x60", 'model="m",closed_by="complete"'),
    ],
    "PushstepDiverged": [series("pushstep_parameters_nonfinite", "1x60")],
    "PushstepSnapshotStale": [
        series("pushstep_snapshot_created_timestamp_seconds", "60x60"),
        series("pushstep_snapshot_interval_seconds", "60x60"),
        series("pushstep_version", "0+1x60"),
        series("pushstep_snapshot_version", "1x60"),
    ],
    "PushstepSnapshotFailed": [series("pushstep_events_total", "0+1x60", 'model="m",kind="snapshot_failed"')],
    "PushstepJournalRefuses": [
        series("pushstep_push_refusals_total", "0+6x60", 'model="m",code="journal_full"')
    ],
    "PushstepDiskNearlyFull": [
        series("pushstep_disk_bytes", "9x60", 'of="free"'),
        series("pushstep_disk_bytes", "100x60", 'of="total"'),
    ],
    "PushstepSyncSlow": per_bucket("pushstep_journal_sync_seconds", "0+60x60", 'model="m",'),
    "PushstepEventLoopLag": per_bucket("pushstep_event_loop_lag_seconds", "0+60x60", ""),
    "PushstepStagingFull": [
        series("pushstep_budget_used_bytes", "95x60", 'budget="staging"'),
        series("pushstep_budget_limit_bytes", "100x60", 'budget="staging"'),
    ],
    "PushstepFilesNearlyOut": [
        series("process_open_fds", "95x60", ""),
        series("process_max_fds", "100x60", ""),
    ],
}


def test_each_alert_fires_on_its_trouble_alone(tmp_path: Path) -> None:
    """promtool's own test of rules, with made-up series."""
    assert TROUBLE.keys() == ALERTS.keys()
    for alert, given in TROUBLE.items():
        tests = {
            "rule_files": [str(ALERTS_FILE)],
            "tests": [
                {
                    "interval": "1m",
                    "input_series": given,
                    "promql_expr_test": [
                        {
                            "expr": f'count(ALERTS{{alertstate="firing",alertname="{name}"}})',
                            "eval_time": "59m",
                            "exp_samples": [{"labels": "{}", "value": 1}] if name == alert else [],
                        }
                        for name in ALERTS
                    ],
                }
            ],
        }
        (tmp_path / f"{alert}.yml").write_text(yaml.safe_dump(tests))
    told = subprocess.run(
        ["promtool", "test", "rules", *map(str, sorted(tmp_path.glob("*.yml")))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr


def test_the_dashboard_s_panels_lie_beside_each_other() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    for a, b in itertools.combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
