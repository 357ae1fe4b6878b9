"""The log: whoever does not read it holds up nobody, what was dropped is said, and no name makes a line of its own."""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from pushstep.proto import training_pb2 as pb
from pushstep.proto.types_pb2 import Identity
from pushstep.server.process import logs
from pushstep.server.process.log_format import FORMATS, INDENT, TEXT
from pushstep.server.process.logs import LogWriter
from pushstep.server.process.request_log import RequestLog, about
from tests.support.servers.harness import COMMANDS, DEVICE, RunningServer, refused_start, running_server
from tests.support.source_tree import name_of, python_files
from tests.support.workers.wire import Wire


@pytest.fixture
def pipe() -> tuple[int, int]:
    return os.pipe()


def logger(writer: LogWriter) -> logging.Logger:
    made = logging.Logger("test")
    made.addHandler(writer)
    return made


def test_lines_come_in_order(pipe: tuple[int, int]) -> None:
    writer = LogWriter(pipe[1])
    log = logger(writer)
    threads = [
        threading.Thread(target=lambda k=k: [log.info("%d %d", k, n) for n in range(200)]) for k in range(4)
    ]
    for thread in threads:
        thread.start()
    with os.fdopen(pipe[0]) as reader:
        lines = [reader.readline().split() for _ in range(800)]
    for thread in threads:
        thread.join()
    for k in range(4):
        assert [int(n) for thread, n in lines if int(thread) == k] == list(range(200))
    os.close(pipe[1])


def test_nobody_waits_for_a_reader(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "KEPT_BYTES", 1 << 16)
    monkeypatch.setattr(logs, "LAST_S", 0.01)
    writer = LogWriter(pipe[1])
    log = logger(writer)
    for number in range(10_000):
        log.info("%06d %s", number, "x" * 93)
    writer.flush()
    with os.fdopen(pipe[0]) as reader:
        got = dropped = 0
        while got + dropped < 10_000:
            line = reader.readline()
            if line.endswith("were dropped: nobody read them\n"):
                dropped += int(line.split()[0])
            else:
                assert int(line.split()[0]) == got + dropped  # what comes is in order and without a gap
                got += 1
        assert dropped > 5_000
        log.info("and on")
        assert reader.readline() == "and on\n"
    os.close(pipe[1])


def test_a_reader_that_is_gone_ends_nothing(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    writer = LogWriter(pipe[1])
    logger(writer).info("nobody")
    writer.flush()
    os.close(pipe[1])


def test_a_server_whose_parent_never_reads(data: Path) -> None:
    """Each refused request is a line at debug level: many times what the pipe holds."""
    addresses = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", str(data)]
    process = subprocess.Popen(
        [*COMMANDS[DEVICE], *addresses, "--log-level", "debug"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    where = dict(entry.split("=", 1) for entry in process.stdout.readline().split()[1:])
    with httpx.Client(base_url=f"http://{where['http']}", trust_env=False, timeout=20) as client:
        for _ in range(300):
            assert client.get(f"/v1/models/{'x' * 200}/{'y' * 1000}").status_code == 404
        assert client.get("/healthz").json() == {"status": "ok"}
    process.terminate()
    assert process.wait(60) == 0
    process.stdout.close()
    process.stderr.close()


# --- one line is one line

FORGED = "2026-11-30 00:00:00,000 ERROR pushstep.service: forged"
HOSTILE = {
    "newline": f"x\n{FORGED}",
    "carriage return": f"x\r{FORGED}",
    "both": f"x\r\n{FORGED}",
    "vertical tab": f"x\x0b{FORGED}",
    "form feed": f"x\x0c{FORGED}",
    "next line": f"x\x85{FORGED}",
    "line separator": f"x\u2028{FORGED}",
    "paragraph separator": f"x\u2029{FORGED}",
    "escape": f"\x1b[2K\x1b[1G{FORGED}",
    "zero": f"x\x00{FORGED}",
    "backspaces": "x" + "\b" * 80 + FORGED,
    "right to left": f"x\u202e{FORGED[::-1]}",
    "half a pair": f"x\ud800{FORGED}",
    "json": '"}\n{"level": "error", "message": "forged"}',
    "percent": "%s %d %(name)s",
    "long": "x" * 10_000,
}


def written(form: str, say: Any) -> list[str]:
    """What `say` logs, as a terminal or a collector takes it: line by line, by every kind of line break."""
    reader, descriptor = os.pipe()
    writer = LogWriter(descriptor, FORMATS[form]())
    log = logging.getLogger("test_logs")
    log.handlers, log.propagate = [writer], False
    say(log)
    log.handlers = []
    writer.flush()
    os.close(descriptor)
    with os.fdopen(reader, "rb") as pipe:
        return pipe.read().decode().splitlines()


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("form", FORMATS)
def test_no_text_makes_a_line(form: str, text: str) -> None:
    def say(log: logging.Logger) -> None:
        log.error("model %s is unknown", text)
        try:
            raise ValueError(text)
        except ValueError:
            log.exception("model %s failed", text, extra={"model": text, "worker": text, "sequence": 3})

    lines = written(form, say)
    assert all(line.isprintable() for line in lines)
    if form == "json":
        first, second = [json.loads(line) for line in lines]
        assert first["message"] == f"model {text} is unknown"
        assert (second["model"], second["worker"], second["sequence"]) == (text, text, 3)
        assert "ValueError" in second["exception"]
        return
    own = [line for line in lines if not line.startswith(INDENT)]
    assert len(own) == 2
    assert all(" ERROR test_logs: model " in line for line in own)
    assert lines[2] == f"{INDENT}Traceback (most recent call last):"


def test_an_ordinary_line_of_text_is_as_logging_writes_it() -> None:
    record = logging.makeLogRecord(
        {"name": "pushstep.x", "levelname": "INFO", "msg": "model %s: ü", "args": ("m",)}
    )
    assert FORMATS["text"]().format(record) == logging.Formatter(TEXT).format(record)


def test_a_request_s_lines_say_what_it_is_about() -> None:
    def say(log: logging.Logger) -> None:
        door = RequestLog(log.name)
        about("flights", "w0", 7)
        door.warning("refused: %s", "why", extra={"code": "too_stale"})
        about()
        door.warning("refused")

    first, second = [json.loads(line) for line in written("json", say)]
    assert {name: first[name] for name in ("model", "worker", "sequence", "code")} == {
        "model": "flights",
        "worker": "w0",
        "sequence": 7,
        "code": "too_stale",
    }
    assert second.keys() == {"time", "level", "logger", "message"}


def test_every_line_about_a_model_has_it_as_a_field() -> None:
    wrong = [
        f"{name_of(path)}:{node.lineno}"
        for path in python_files("server")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).startswith("log.")
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and str(node.args[0].value).startswith("model %s")
        and "extra" not in [keyword.arg for keyword in node.keywords]
    ]
    assert wrong == []


def test_the_libraries_lines_take_the_same_form() -> None:
    """In a process of its own: pytest has handlers of its own here."""
    names = ["uvicorn.error", "grpc._cython.cygrpc", "asyncio", "py.warnings", "opentelemetry.sdk"]
    code = f"""
import logging
from pushstep.server.process import logs
from pushstep.server import service
import uvicorn
writer = logs.start("info", "json")
uvicorn.Config(None, log_config=None)
for name in {names!r}:
    logging.getLogger(name).error("said by %s\\n%s", name, {FORGED!r})
writer.flush()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["logger"], line["message"]) for line in lines] == [
        (name, f"said by {name}\n{FORGED}") for name in names
    ]


@pytest.fixture(scope="module", params=["text", "json"])
def logged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """All that a server logged that was told hostile names at both doors, and then could not start again."""
    form, data = request.param, tmp_path_factory.mktemp("logs") / "data"
    with running_server(data, "--log-format", form, "--log-level", "debug") as server:
        _tell(server)
        refused = refused_start(data, "--log-format", form)
    assert refused.returncode == 1
    return form, [*server.log.read_text().splitlines(), *refused.stderr.splitlines()]


def _tell(server: RunningServer) -> None:
    wire = Wire(server.grpc)
    with server.connect("flights", "w0") as session:
        session.create({"a": [1.0]})
    for text in HOSTILE.values():
        name = f" {text[:90]}".encode(errors="replace").decode()
        assert server.rest("GET", f"/v1/models/{quote(name, safe='')}").status_code == 404
        for asked in (
            pb.PullRequest(model=name),
            pb.PullRequest(model="flights", identity=Identity(worker=name)),
        ):
            wire.refused("Pull", [asked.SerializeToString()])
        wire.refused("Join", [pb.JoinRequest(model="flights", worker=name).SerializeToString()])
    wire.close()


def test_a_server_s_lines_are_all_its_own(logged: tuple[str, list[str]]) -> None:
    form, lines = logged
    assert len(lines) > 3 * len(HOSTILE)
    assert all(line.isprintable() for line in lines)
    if form == "json":
        found = [json.loads(line) for line in lines]
        assert {line["level"] for line in found} <= {"debug", "info", "warning", "error"}
        assert {line["logger"].split(".")[0] for line in found} <= {"pushstep", "asyncio", "grpc", "uvicorn"}
        refused = [(line.get("model"), line["code"]) for line in found if "code" in line]
        assert (f" {HOSTILE['line separator']}", "unknown_model") in refused
        assert ("flights", "invalid_name") in refused
        assert "pushstep-server: " in found[-1]["message"]
        assert any(line.get("model") == "flights" and "created by" in line["message"] for line in found)
    else:
        assert not any(line.startswith(FORGED) for line in lines)
        assert all(line[:4].isdigit() or line.startswith((INDENT, "pushstep-server: ")) for line in lines)
        assert lines[-1].startswith("pushstep-server: ")
