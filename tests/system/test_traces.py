"""Traces: the spans of a worker's process and of the server's are one tree, joined over the wire; without them, nothing."""

from __future__ import annotations

import ast
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from pushstep.proto import training_pb2 as pb
from pushstep.server.traces.request_spans import trace_of
from tests.support.processes.forked import workers
from tests.support.servers.harness import SUPPORT, RunningServer, refused_start, running_server
from tests.support.source_tree import PACKAGES, name_of, python_files
from tests.support.workers.wire import SERVICE

Span = dict[str, Any]


class Collector(ThreadingHTTPServer):
    """Takes spans by OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.spans: list[Span] = []

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = {a.key: a.value.string_value for a in resource.resource.attributes}["service.name"]
            for span in [span for scope in resource.scope_spans for span in scope.spans]:
                values = {a.key: a.value.string_value or a.value.int_value for a in span.attributes}
                self.spans.append(
                    {
                        "service": service,
                        "name": span.name,
                        "trace": span.trace_id.hex(),
                        "span": span.span_id.hex(),
                        "parent": span.parent_span_id.hex(),
                        "failed": span.status.code == 2,
                        "attributes": values,
                    }
                )


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        self.server.take(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def traced(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[dict[str, list[Span]], list[Span], Path]]:
    """The spans of two workers, by how they send, and those of their server, which is over; and its log."""
    collector = Collector()
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "NO_PROXY": "127.0.0.1",
    }
    data = tmp_path_factory.mktemp("traces") / "data"
    options = ("--otel", "--log-format", "json", "--log-level", "debug")
    with running_server(data, *options, environment=environment) as server:
        ours = {how: worker(server, how) for how in ("framed", "shared")}
        refused(server)
    collector.shutdown()
    collector.server_close()
    yield ours, collector.spans, server.log


def worker(server: RunningServer, how: str) -> list[Span]:
    done = workers().call((SUPPORT / "workers" / "traced.py").read_text(), server.grpc, how)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def refused(server: RunningServer) -> None:
    """A pull that is refused, under a trace; then ones whose headers are none."""
    for header in (
        f"00-{TRACE}-00f067aa0ba902b7-01",
        "00-zz-1-01",
        "x" * 1000,
        f"00-{TRACE}-é".encode().decode("ascii", "replace"),
    ):
        with grpc.insecure_channel(server.grpc) as channel:
            call = channel.unary_unary(f"{SERVICE}Pull")
            with pytest.raises(grpc.RpcError):
                call(pb.PullRequest(model="nobody").SerializeToString(), metadata=(("traceparent", header),))


@pytest.mark.parametrize("how", ["framed", "shared"])
def test_a_step_is_one_tree_through_both_processes(
    traced: tuple[dict[str, list[Span]], list[Span], Path], how: str
) -> None:
    ours, theirs = traced[0][how], traced[1]
    at = {span["span"]: span for span in ours}
    assert all(span["service"] == "pushstep-server" for span in theirs)
    steps = [span for span in ours if span["name"] == "pushstep.step"]
    assert len(steps) == 4
    assert all(at[step["parent"]]["name"] == "batch" for step in steps)
    exchanges = [span for span in ours if span["name"] == "pushstep.exchange"]
    assert len(exchanges) == 4
    for exchange in exchanges:
        assert at[exchange["parent"]]["name"] == "pushstep.step"
        assert exchange["attributes"]["pushstep.outcome"] == "applied"
        (served,) = [span for span in theirs if span["parent"] == exchange["span"]]
        assert (served["name"], served["trace"]) == ("pushstep.server.exchange", exchange["trace"])
        for name in ("model", "worker", "sequence"):
            assert served["attributes"][f"pushstep.{name}"] == exchange["attributes"][f"pushstep.{name}"]
        assert not served["failed"]
    for name in ("push", "pull"):
        mine = [span for span in ours if span["name"] == f"pushstep.{name}"]
        under = [span for span in theirs if span["parent"] in {span["span"] for span in mine}]
        assert under
        assert {span["name"] for span in under} == {f"pushstep.server.{name}"}


def test_a_refusal_is_in_the_trace_and_the_trace_in_the_log(
    traced: tuple[dict[str, list[Span]], list[Span], Path],
) -> None:
    _, theirs, log = traced
    failed = [span for span in theirs if span["attributes"].get("pushstep.model") == "nobody"]
    assert len(failed) == 3
    assert all(span["failed"] for span in failed)
    assert sum(span["trace"] == TRACE for span in failed) == 1
    assert sum(span["parent"] == "" for span in failed) == 2
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    refusals = [line for line in lines if line.get("code") == "unknown_model"]
    assert {line["trace_id"] for line in refusals} == {span["trace"] for span in failed}


@pytest.mark.parametrize(
    "text",
    ["", "00", "x" * 55, f"00-{TRACE}-00f067aa0ba902b7-01\n", f"00-{TRACE.upper()}-00f067aa0ba902b7-01"],
)
def test_what_is_no_traceparent_names_no_trace(text: str) -> None:
    assert trace_of(text) == ""


def test_without_the_extra_the_server_says_what_to_install(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked.py"
    blocked.write_text(
        "import sys\nsys.modules['opentelemetry.sdk'] = None\nfrom pushstep.server.__main__ import main\nmain()\n"
    )
    done = refused_start(tmp_path / "data", "--otel", file=str(blocked))
    assert done.returncode == 1
    assert "pip install 'pushstep[otel]'" in done.stderr.splitlines()[-1]


def test_nothing_of_it_is_imported_unless_it_is_asked_for(server: RunningServer) -> None:
    code = f"""
import sys
import numpy as np
from pushstep.client import connect
with connect({server.grpc!r}, model="untraced", worker="w0") as session:
    session.create({{"p": np.ones(4, dtype=np.float32)}})
    session.exchange({{"p": np.ones(4, dtype=np.float32)}})
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""
    done = workers().call(code)
    assert done.returncode == 0, done.stderr
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in python_files(*PACKAGES)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "opentelemetry" in ast.unparse(node)
    ]
    assert wrong == []
