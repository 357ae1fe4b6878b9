"""docs/limits.md's table says what the code does: each row's default is made of the constants here."""

from __future__ import annotations

import math
import re
from pathlib import Path

import uvicorn

from pushstep.proto import training_pb2 as pb
from pushstep.proto.types_pb2 import Identity, Manifest, Parameter
from pushstep.proto.wire import layout, parts
from pushstep.proto.wire.frames import IDLE_S, MAX_CHUNK_BYTES, MAX_MESSAGE_BYTES
from pushstep.proto.wire.limits import limit_of
from pushstep.server.access import attempts, request_rate, tokens
from pushstep.server.arenas import publisher as publish
from pushstep.server.config import Config
from pushstep.server.coordinator import sessions as session
from pushstep.server.coordinator import settings
from pushstep.server.coordinator.hooks import chain, schedulers
from pushstep.server.coordinator.worker import RECEIPTS_KEPT
from pushstep.server.imports import file_groups
from pushstep.server.models import (
    catalog,
    copies,
    creations,
    events,
    held_pushes,
)
from pushstep.server.observers import addresses, observers, webhook
from pushstep.server.operator_door import app, http_protocol
from pushstep.server.operator_door.answers import downloads, event_stream
from pushstep.server.process import descriptors, threads
from pushstep.server.service import GRPC_OPTIONS
from pushstep.server.staging import budget
from pushstep.server.storage import tensor_file
from pushstep.server.streams import counted_parts, received, timed_messages
from pushstep.server.worker_door.methods import REQUEST_S

PAGE = (Path(__file__).parents[2] / "docs/limits.md").read_text()
DEFAULTS = Config()


def size(count: int) -> str:
    """Bytes as the table writes them."""
    parts = []
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >> shift:
            parts.append(f"{count >> shift} {unit}")
            count &= (1 << shift) - 1
    assert not count
    return " and ".join(parts)


def duration(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 120 else f"{seconds:g} s"


def count(field: str, kind: type = Manifest) -> str:
    return f"{limit_of(kind, field).count:,}"


def length(field: str, kind: type) -> str:
    return f"{limit_of(kind, field).bytes:,}"


def power(limit: int) -> str:
    assert limit.bit_count() == 1
    return f"2^{limit.bit_length() - 1}"


def waiting(pool: threads.Threads) -> int:
    assert pool.most_waiting is not None
    return pool.most_waiting


GRPC = dict(GRPC_OPTIONS)
A_QUARTER = {0.25: "a quarter"}
TIMES = {4: "four"}
COPIES = f"{copies.COPIES_AT_ONCE}"
STATE_BYTES = limit_of(pb.PushHeader, "worker_state").bytes
# By how a row begins.
EXPECTED = {
    "models (`--max-models`)": f"{DEFAULTS.max_models}",
    "parameters, optimizer state and extras": size(DEFAULTS.max_bytes),
    "pushes and uploads on their way": size(DEFAULTS.staging_bytes),
    "answers on their way": "as `--staging-bytes`",
    "a wait for a turn": duration(catalog.Catalog(DEFAULTS).reading.wait_s),
    "workers of a model, live": f"{DEFAULTS.max_workers:,}",
    "these workers, their receipts": size(DEFAULTS.worker_bytes),
    f"a stream, an answer or a download of which less than {size(timed_messages.PROGRESS_BYTES)} moves": duration(
        DEFAULTS.stall_s
    ),
    "the one message of a call": duration(REQUEST_S),
    "a call of TakeSteps, between two pushes": duration(IDLE_S),
    "a push that waits for other workers": duration(held_pushes.HOLD_S),
    "a worker that is not heard of": duration(DEFAULTS.lease_s),
    "calls at once on one connection": f"{GRPC['grpc.max_concurrent_streams']}",
    f"requests over {size(received.INLINE_MESSAGE_BYTES)} that wait": (
        f"{waiting(threads.REQUESTS)}; {A_QUARTER[threads.SHARE_OF_REQUESTS]} of the time of one core, after the first "
        f"{duration(threads.BURST_S)}"
    ),
    "pushes of a worker in flight; receipts": f"{session.IN_FLIGHT}; {RECEIPTS_KEPT}",
    "versions of a model that are being read": f"{publish.LIVE_VERSIONS}",
    "copies of models, each shared": COPIES,
    "for exports, the state_dict": COPIES,
    "for a look at a parameter": COPIES,
    "for snapshots being written": COPIES,
    "for restores and replaced states": COPIES,
    "checkpoints' files": f"{downloads.FILES_AT_ONCE}",
    "snapshots and checkpoints that are read": (
        f"{A_QUARTER[threads.SHARE_OF_READS]} of the cores, and {waiting(threads.READS)} that wait"
    ),
    "how long a creation ticket holds": duration(creations.CREATION_S),
    "tickets of one connection": f"{creations.TICKETS_PER_CONNECTION}; {size(creations.TICKETS_BYTES)}",
    "a message of gRPC's": f"{size(MAX_MESSAGE_BYTES)}; {size(MAX_CHUNK_BYTES)}",
    "a manifest or header, in parts": (
        f"{size(parts.MAX_WHOLE_BYTES)}; {duration(counted_parts.PARTS_S)} and one for each "
        f"{size(counted_parts.LEAST_BYTES_PER_S).removeprefix('1 ')}; {A_QUARTER[budget.PARTS_SHARE]}"
    ),
    "parameters; param groups; names": (
        f"{count('parameters')}; {count('groups')}; {limit_of(Parameter, 'aliases').count + 1:,}; "
        f"{layout.MAX_DIMENSIONS}; {power(layout.MAX_ELEMENTS)}"
    ),
    "rows of one PullRows": count("ids", pb.PullRowsRequest),
    "a model's or worker's name": f"{length('worker', Identity)}; {length('name', Parameter)} bytes",
    "metrics of a push": (
        f"{count('metrics', pb.PushHeader)}; {length('metrics', pb.PushHeader)} bytes; {size(STATE_BYTES)}"
    ),
    "steps that a parameter": power(int(limit_of(pb.UploadHeader, "steps").most)),
    "the header of uploaded extras": size(tensor_file.LONGEST_HEADER_BYTES),
    "workers' connections": (f"{DEFAULTS.max_connections:,}, or as many as the process may open files for"),
    "to speak HTTP/2": "; ".join(
        duration(GRPC[name] / 1000)
        for name in ("grpc.server_handshake_timeout_ms", "grpc.max_connection_idle_ms")
    )
    + "; "
    + f"{(GRPC['grpc.keepalive_time_ms'] + GRPC['grpc.keepalive_timeout_ms']) / 1000:g} s",
    "headers of a call": size(GRPC["grpc.absolute_max_metadata_size"]),
    "HTTP requests of one token": f"{request_rate.FREE:,} at once, and {request_rate.PER_S:g} in each second",
    "requests without a right token": f"{attempts.FREE_ATTEMPTS:,}; {attempts.PER_S:g}",
    "addresses of which that is known": f"{attempts.MOST_ADDRESSES:,}; {tokens.MOST_TOKENS:,}",
    "a TLS handshake at the HTTP port": "`--stall-s`",
    "HTTP connections": f"{descriptors.MOST_HTTP:,}, or a quarter of those files",
    "HTTP requests under way": f"{app.MOST_REQUESTS}",
    "scrapes of": (
        f"{threads.METRICS.count + waiting(threads.METRICS)}; {A_QUARTER[threads.SHARE_OF_READS]} of that of one "
        f"core, after the first {duration(threads.METRICS_BURST_S)}"
    ),
    "the head of an HTTP request": f"{size(http_protocol.MAX_HEAD_BYTES)}, `--stall-s`",
    "its body": (
        f"{size(app.MAX_BODY_BYTES)} of JSON, {settings.MAX_DEPTH} deep, {settings.MAX_ENTRIES:,} entries of one list "
        f"or object; {TIMES[http_protocol.BODY_STALLS]} times `--stall-s`"
    ),
    "a file that is imported": (
        f"`--max-bytes`; {size(tensor_file.LONGEST_HEADER_BYTES)}, or what the names of a large model take"
    ),
    f"the time for each {size(http_protocol.BODY_PROGRESS_BYTES)} of such a file": (
        f"{TIMES[http_protocol.BODY_STALLS]} times `--stall-s`"
    ),
    "patterns in the groups of a file": f"{file_groups.MOST_PATTERNS}",
    "an HTTP connection between two requests": duration(uvicorn.Config("any").timeout_keep_alive),
    "whole numbers of a policy": f"{power(settings.LARGEST_WHOLE)}; 10^{round(math.log10(schedulers.LARGEST))}",
    "hooks of a model": (
        f"{chain.MAX_HOOKS}; {size(chain.MAX_SETTINGS_BYTES)}; {schedulers.MAX_SCHEDULERS}; {schedulers.MAX_LIST:,}"
    ),
    "events kept of a model": f"{events.EVENTS_KEPT:,}; {size(events.EVENT_BYTES)}; {size(events.EVENTS_BYTES)}",
    "streams of events": f"{event_stream.MOST_LISTENERS}; {event_stream.MOST_BEHIND}",
    "events that observers": f"{observers.OBSERVER_QUEUE:,}",
    "a webhook's request": (
        f"{duration(webhook.TIMEOUT_S)} (at most {webhook.MOST_TIMEOUT_S:.0f}); {addresses.LONGEST_URL:,} characters; "
        f"{size(webhook.LONGEST_BODY_BYTES)}; {size(webhook.ANSWER_BYTES)}"
    ),
}


def test_the_table_of_limits_says_what_the_code_does() -> None:
    section = PAGE.split("## The table")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| ") and not line.startswith("| what ")
    ]
    wrong = {}
    for what, default, beyond in rows:
        (expected,) = [value for begin, value in EXPECTED.items() if what.startswith(begin)] or [None]
        if expected != default:
            wrong[what] = (default, expected)
        assert beyond
    assert wrong == {}
    assert len(rows) == len(EXPECTED)


def test_every_setting_that_is_a_limit_is_in_the_table() -> None:
    limits = [
        name for name in Config.model_fields if re.search("^max_|(?<!part)_bytes$|^lease_s|^stall_s", name)
    ]
    section = PAGE
    assert [name for name in limits if f"`--{name.replace('_', '-')}`" not in section] == []
