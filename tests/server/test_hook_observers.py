"""Observers with files and network: TensorBoard's own reader, an OTLP collector, an example package; each alone with its faults."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pushstep.proto.errors import MissingExtra, PushstepError
from pushstep.server.coordinator.hooks.hook import Hook, Place, Point
from pushstep.server.observers.catalogue import OBSERVERS
from tests.support.servers.harness import SERVER, RunningServer, running_server, wait_until
from tests.support.servers.operators import add_hook, remove_hook, restore, take_snapshot
from tests.support.workers.wire import created

ONES = {"bias": np.ones(4, np.float32)}
# A package as somebody else writes it.
EXAMPLE = '''
from typing import Any, ClassVar

from pydantic import Field

from pushstep.proto.errors import RejectedByHook
from pushstep.server.coordinator.hooks.hook import Hook, Point, StepContext
from pushstep.server.coordinator.settings import Settings


class LimitSettings(Settings):
    most_norm: float = Field(gt=0, description="the largest norm that a push may have")


class Limit(Hook):
    """Rejects pushes with a larger norm, and counts them."""

    name: ClassVar[str] = "limit"
    kind = "guard"
    points: ClassVar[frozenset[Point]] = frozenset({Point.STEP_PRE})
    settings_type: ClassVar[type[Settings]] = LimitSettings
    settings: LimitSettings

    def __init__(self, hook_id: str, point: Point, settings: LimitSettings) -> None:
        super().__init__(hook_id, point, settings)
        self._rejected = 0

    def step_pre(self, context: StepContext) -> None:
        if context.gradient_norm > self.settings.most_norm:
            self._rejected += 1
            raise RejectedByHook(hook=self.hook_id, problem=f"norm {context.gradient_norm:g}")
        context.factor *= 0.5

    def state(self) -> dict[str, Any]:
        return {"rejected": self._rejected}

    def load_state(self, state: Any, groups: Any) -> None:
        self._rejected = state["rejected"]


class Faulty(Hook):
    """Fails wherever it can."""

    name: ClassVar[str] = "faulty"
    kind = "observer"
    points: ClassVar[frozenset[Point]] = frozenset({Point.STEP_POST})

    def step_post(self, context: Any, groups: Any) -> None:
        raise RuntimeError("step_post")

    def observe(self, event: Any) -> None:
        raise RuntimeError("observe")

    def nonfinite(self) -> Any:
        raise RuntimeError("nonfinite")

    def missing_metric(self) -> Any:
        raise RuntimeError("missing_metric")

    def state(self) -> dict[str, Any]:
        if getattr(self, "asked", False):
            raise RuntimeError("state")
        self.asked = True
        return {"fine": 1}


class NoHook:
    name = "no_hook"
'''
ENTRY_POINTS = """[pushstep.hooks]
limit = example_hooks:Limit
faulty = example_hooks:Faulty
no_hook = example_hooks:NoHook
gone = example_hooks.gone:Gone
ema = example_hooks:Limit
"""


class Collector(BaseHTTPRequestHandler):
    """Keeps the spans that are sent to it."""

    seen: ClassVar[list[Any]] = []

    def do_POST(self) -> None:
        request = ExportTraceServiceRequest()
        request.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
        type(self).seen += [
            span
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def collector() -> Iterator[int]:
    served = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served.server_port
    served.shutdown()
    served.server_close()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed package: its module, and what an installer writes beside it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "example_hooks.py").write_text(EXAMPLE)
    info = folder / "example_hooks-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example-hooks\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


@pytest.fixture(scope="module")
def watched(
    tmp_path_factory: pytest.TempPathFactory, collector: int, package: Path
) -> Iterator[RunningServer]:
    """A server that has the package, and sends its spans to the collector."""
    environment = {
        **os.environ,
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "PYTHONPATH": str(package),
    }
    # a process of its own from the start: Python looks for packages where its environment said then
    command = [shutil.which("env") or "env", SERVER]
    folder = tmp_path_factory.mktemp("watched") / "data"
    with running_server(
        folder, "--durability", "durable", environment=environment, command=command
    ) as running:
        yield running


def scalars(server: RunningServer, model: str, hook: str) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds."""
    folder = server.data / "tensorboard" / model / hook
    if not folder.exists():  # the writer is imported at the first event
        return {}
    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(entry.step, entry.value) for entry in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_reads_what_was_trained(watched: RunningServer, model_name: str) -> None:
    with created(watched, model_name) as session:
        add_hook(watched, model_name, "clip_grad_norm", "step_pre", {"max_norm": 0.5})
        hook = add_hook(watched, model_name, "tensorboard", "step_post", {})["id"]
        receipts = [session.push(ONES, metrics={"loss": 1 / step}) for step in range(1, 6)]
        wait_until(lambda: len(scalars(watched, model_name, hook).get("metrics/loss", ())) == 5)
        found = scalars(watched, model_name, hook)
        versions = [receipt.version for receipt in receipts]
        assert [step for step, _ in found["metrics/loss"]] == versions
        for tag, expected in {
            "metrics/loss": [1 / step for step in range(1, 6)],
            "gradient_norm": [receipt.gradient_norm for receipt in receipts],
            "clip_factor": [receipt.clip_factor for receipt in receipts],
            "staleness": [receipt.staleness for receipt in receipts],
            "lr/group_0": [receipt.effective_lr[0] for receipt in receipts],
        }.items():
            assert [value for _, value in found[tag]] == pytest.approx(expected, rel=1e-6), tag
        # a restore goes back: what it has undone is hidden, as after a restart of any training
        snapshot = take_snapshot(watched, model_name)["id"]
        session.push(ONES, metrics={"loss": 7.0})
        restore(watched, model_name, snapshot)
    with watched.connect(model_name, "again") as session:
        session.push(ONES, metrics={"loss": 8.0})
        remove_hook(watched, model_name, hook)
        last = (versions[-1] + 1, 8.0)
        wait_until(lambda: scalars(watched, model_name, hook)["metrics/loss"][-1] == last)
        assert len(scalars(watched, model_name, hook)["metrics/loss"]) == 6


def test_each_step_is_a_span(watched: RunningServer, model_name: str) -> None:
    Collector.seen.clear()
    with created(watched, model_name) as session:
        add_hook(watched, model_name, "otel_span", "step_post", {})
        receipts = [session.push(ONES, metrics={"loss": 0.5}) for _ in range(3)]
        wait_until(lambda: len(Collector.seen) == 3)
    for span, receipt in zip(Collector.seen, receipts, strict=True):
        facts = {entry.key: entry.value for entry in span.attributes}
        assert span.name == "pushstep.step"
        assert facts["pushstep.version"].int_value == receipt.version
        assert facts["pushstep.model"].string_value == model_name
        assert facts["pushstep.worker"].string_value == "owner"
        assert facts["pushstep.metrics.loss"].double_value == 0.5
        assert 0 <= span.end_time_unix_nano - span.start_time_unix_nano < 60e9


def test_a_package_brings_a_hook(watched: RunningServer, model_name: str) -> None:
    """It is in the catalogue, rejects by name, scales, keeps its state; what cannot be loaded is named in the log."""
    shown = {entry["name"]: entry for entry in watched.rest("GET", "/v1/hooks").json()["hooks"]}
    assert shown["limit"]["settings"]["properties"]["most_norm"]["exclusiveMinimum"] == 0
    assert shown["ema"]["description"].startswith("average")
    assert not shown.keys() & {"no_hook", "gone"}
    text = watched.log.read_text()
    for name in ("no_hook", "gone", "ema"):
        assert f"the hook {name} of example-hooks 1.2" in text
    with created(watched, model_name) as session:
        bad = {"name": "limit", "point": "step_pre", "settings": {"most_norm": -1}}
        refused = watched.rest("POST", f"/v1/models/{model_name}/hooks", json=bad)
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid_hook")
        hook = add_hook(watched, model_name, "limit", "step_pre", {"most_norm": 5.0})["id"]
        assert session.push(ONES).clip_factor == 0.5
        with pytest.raises(PushstepError) as caught:
            session.push({"bias": np.full(4, 100.0, np.float32)})
        assert (caught.value.code, caught.value.fields["hook"]) == ("rejected_by_hook", hook)
        path = f"/v1/models/{model_name}/hooks/{hook}"
        assert watched.rest("GET", path).json()["state"] == {"rejected": 1}
        changed = watched.rest("PATCH", path, json={"settings": {"most_norm": 1000.0}})
        assert changed.status_code == 200
        assert session.push({"bias": np.full(4, 100.0, np.float32)}).clip_factor == 0.5


def test_a_faulty_observer_fails_nothing(watched: RunningServer, model_name: str) -> None:
    with created(watched, model_name) as session:
        hook = add_hook(watched, model_name, "faulty", "step_post", {})["id"]
        log = add_hook(watched, model_name, "json_log", "step_post", {})["id"]
        versions = [session.push(ONES).version for _ in range(3)]
        assert versions == [2, 3, 4]
        take_snapshot(watched, model_name)

        def failures() -> dict[str, int]:
            listed = watched.rest("GET", f"/v1/models/{model_name}/hooks").json()["hooks"]
            return {entry["id"]: entry["failures"] for entry in listed}

        wait_until(lambda: failures()[hook] >= 6)
        assert failures()[log] == 0
        state = watched.rest("GET", f"/v1/models/{model_name}/state-dict").json()["hooks"]
        assert [entry["state"] for entry in state] == [{"fine": 1}, {}]


@pytest.mark.parametrize("kind", [kind for kind in OBSERVERS if kind.name != "webhook"])
def test_what_is_not_installed_is_named(
    kind: type[Hook], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an import of a package that is not there fails."""
    package = {"tensorboard": "tensorboard", "otel_span": "opentelemetry.sdk"}[kind.name]
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    hook = kind(f"{kind.name}-1", Point.STEP_POST, kind.settings_type())
    for prepare in (hook.prepare, hook.open):
        with pytest.raises(MissingExtra) as caught:
            prepare(Place("m", tmp_path))
        assert f"pushstep[{caught.value.fields['extra']}]" in caught.value.message
    assert json.dumps(caught.value.fields)
