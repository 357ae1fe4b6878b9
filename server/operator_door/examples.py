"""Examples of the description: an answer of each route, and each error of the catalogue.

A test holds that a server's own answers have the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import Formatter
from typing import Any, Final

from pushstep.proto.errors import CATALOGUE
from pushstep.proto.errors.status import to_problem

_M: Final = "/v1/models/{m}"
_POLICY: Final = {"policy": "async", "scale": False, "max_staleness": None, "max_staleness_by_group": {}}
_GATE: Final = {
    "nonfinite": "reject",
    "norm_outlier": 6.0,
    "norm_warmup": 50,
    "quarantine_after": 20,
    "norms_seen": 812,
    "norm_limit": 31.7,
}
_MODEL: Final = {
    "name": "flights",
    "uid": "5f1c0a9be21d4c7f8a60b3d2e4975c11",
    "timeline": 1,
    "version": 1200,
    "edit": 3,
    "parameters": 4,
    "elements": 1290,
    "bytes": 24576,
    "groups": 1,
    "hooks": 1,
    "policy": _POLICY,
    "nonfinite": "reject",
    "workers_live": 2,
    "workers_quarantined": 0,
    "parameters_nonfinite": [],
    "failed": None,
    "last_step": {
        "version": 1200,
        "worker": "w0",
        "staleness": 1,
        "gradient_norm": 0.82,
        "clip_factor": 1.0,
        "metrics": {"loss": 0.31},
    },
}
_ROOM: Final = {"count": 1204, "sum": 0.361}
_FIGURES: Final = {
    "pushes": {
        "applied": 1200,
        "skipped": 0,
        "dropped_late": 0,
        "too_stale": 0,
        "rejected": 4,
        "superseded": 0,
    },
    "refused": 4,
    "pending": 0,
    "seconds": dict.fromkeys(["receive", "wait", "queue", "journal", "step", "publish"], _ROOM),
    "staleness": {"count": 1200, "sum": 640.0},
    "lr": [0.1],
    "durability": "durable",
    "durable_version": 1200,
    "snapshot": {"version": 1180, "created": 1790000000.0},
}
_GROUP: Final = {
    "index": 0,
    "rule": "adagrad",
    "optimizer": 0,
    "lr": 0.1,
    "lr_decay": 0.0,
    "weight_decay": 0.0,
    "initial_accumulator_value": 0.0,
    "eps": 1e-10,
    "maximize": False,
    "params": ["0.weight", "0.bias"],
    "params_total": 2,
    "held": ["lr"],
    "scheduled_by": None,
    "frozen": False,
    "etag": '"5f1c0a9b-1-3"',
}
_HOOK: Final = {
    "id": "clip_grad_norm-1",
    "name": "clip_grad_norm",
    "kind": "transform",
    "point": "step_pre",
    "settings": {"max_norm": 1.0},
    "failures": 0,
    "dropped": 0,
}
_SNAPSHOT: Final = {
    "id": "t1-v1200-e3-1",
    "timeline": 1,
    "version": 1200,
    "edit": 3,
    "created": 1790000000.0,
    "automatic": False,
    "digest": "9c1185a5c5e9fc54612808977ee8f548b2258d31",
    "files": [
        {"file": "arena-0000.safetensors", "arena": 0, "group": 0, "start": 0, "stop": 1290, "bytes": 10488}
    ],
}
_WORKER: Final = {
    "name": "w0",
    "state": "live",
    "lead": True,
    "epoch": 1,
    "sequence": 601,
    "lag": 1,
    "staleness": 1,
    "last_seen_s": 0.02,
    "lease_left_s": 29.98,
    "outcomes": {"applied": 600, "rejected": 1},
    "duplicates": 0,
    "in_flight": 0,
    "refused_in_row": 0,
    "quarantined": False,
    "quarantined_by_hand": False,
    "metrics": {"loss": 0.31},
}
_PARAMETER: Final = {
    "name": "0.weight",
    "shape": [16, 8],
    "dtype": "float32",
    "group": 0,
    "aliases": [],
    "row_sparse": False,
    "steps": 1200,
}
_EVENT: Final = {
    "id": 17,
    "time": 1790000000.0,
    "kind": "param_group_changed",
    "by": "operator",
    "actor": "local",
    "timeline": 1,
    "version": 1200,
    "edit": 3,
    "group": 0,
    "values": {"lr": 0.1},
    "hold": True,
}
_DURABILITY: Final = {
    "level": "durable",
    "snapshot_every_s": 60.0,
    "keep": 2,
    "version": 1200,
    "durable_version": 1200,
    "journal_bytes": 1048576,
    "snapshots_store": None,
}
_RANK: Final = {
    "rank": 0,
    "state": "serving",
    "address": "127.0.0.1:7070",
    "unix_path": "/run/pushstep/pushstep-7070.sock",
    "silent_s": 0.0,
    "figures_age_s": 0.0,
    "versions_behind": 0,
    "pushes_staged": 2,
    "seconds": {"step": _ROOM, "journal": _ROOM},
    "traffic_bytes": {"in": 9437184, "out": 9437184},
    "snapshot_created": 1790000000.0,
    "bytes": {"held": 24576, "limit": 1099511627776},
    "staging_bytes": {"held": 0, "limit": 8589934592},
    "read_bytes": {"held": 0, "limit": 8589934592},
    "memory_bytes": {"available": 16000000000, "total": 23000000000},
    "device": "cpu",
}
_SHARDED: Final = {
    "name": "flights",
    "timeline": 1,
    "version": 1200,
    "map_version": None,
    "bytes": 24576,
    "skew": 1.0,
    "shards": [
        {"rank": 0, "version": 1200, "parameters": 4, "elements": 1290, "bytes": 24576, "share": 1.0},
    ],
}
_NEXT: Final = {"effective_version": 1201}
_OF_WORKER: Final = {"name": "w0", **_NEXT}
_RESTORED: Final = {"timeline": 2, "effective_version": 1200}
_NUMBERS: Final = {"min": -0.9, "max": 0.8, "mean": 0.01, "norm": 3.2}
# By method and path: the answer to an edit that is made, or to a GET.
ANSWERS: Final[Mapping[tuple[str, str], Mapping[str, Any]]] = {
    ("get", "/healthz"): {"status": "ok"},
    ("get", "/readyz"): {"ready": True},
    ("get", "/v1"): {
        "version": "0.1.0",
        "grpc": "127.0.0.1:7070",
        "ranks": 1,
        "caller": {"name": "ann", "role": "operator", "models": []},
    },
    ("get", "/v1/capacity"): {
        "models": {"held": 1, "limit": 100, "not_loaded": 0},
        "bytes": {"held": 24576, "limit": 1099511627776},
        "staging_bytes": {"held": 0, "limit": 8589934592},
        "read_bytes": {"held": 0, "limit": 8589934592},
        "memory_bytes": {"available": 16000000000, "total": 23000000000},
        "device": "cpu",
        "rates": {
            "ingest_bytes_per_s": 2100000000,
            "step_elements_per_s": {"adadelta": 410000000, "adagrad": 640000000},
            "snapshot_bytes_per_s": 480000000,
            "age_s": 12.0,
        },
    },
    ("get", "/v1/shards"): {
        "world": 1,
        "ready": True,
        "skew": 1.0,
        "ranks": [_RANK],
        "models": [_SHARDED],
        "next": None,
    },
    ("get", "/v1/models"): {"models": [_MODEL], "next": None, "not_loaded": []},
    ("post", "/v1/models"): _MODEL,
    ("get", _M): {**_MODEL, "figures": _FIGURES},
    ("get", f"{_M}/param-groups"): {"param_groups": [_GROUP], "total": 1, "next": None, **_NEXT},
    ("post", f"{_M}/param-groups"): {**_GROUP, **_NEXT, "workers_live": 1, "workers_told": ["w0"]},
    ("get", f"{_M}/param-groups/{{index}}"): {**_GROUP, **_NEXT},
    ("patch", f"{_M}/param-groups/{{index}}"): {**_GROUP, **_NEXT},
    ("get", f"{_M}/parameters"): {"parameters": [_PARAMETER], "total": 1, "next": None},
    ("get", f"{_M}/parameters/{{name}}"): {
        **_PARAMETER,
        "version": 1200,
        "timeline": 1,
        "statistics": {"value": _NUMBERS, "sum": _NUMBERS},
        "looked_at": 128,
    },
    ("get", "/v1/hooks"): {"hooks": [{"name": "clip_grad_norm", "kind": "transform", "points": ["step_pre"]}]},
    ("get", f"{_M}/hooks"): {"hooks": [_HOOK], "next": None, "dropped_events": 0, **_NEXT},
    ("post", f"{_M}/hooks"): {**_HOOK, **_NEXT},
    ("get", f"{_M}/hooks/{{hook_id}}"): {**_HOOK, "state": {}},
    ("patch", f"{_M}/hooks/{{hook_id}}"): {**_HOOK, "order": ["clip_grad_norm-1"], **_NEXT},
    ("delete", f"{_M}/hooks/{{hook_id}}"): {"id": "clip_grad_norm-1", **_NEXT},
    ("get", f"{_M}/policy"): {**_POLICY, **_NEXT},
    ("patch", f"{_M}/policy"): {**_POLICY, **_NEXT},
    ("get", f"{_M}/gate"): {**_GATE, **_NEXT},
    ("patch", f"{_M}/gate"): {**_GATE, **_NEXT},
    ("get", f"{_M}/workers"): {"workers": [_WORKER], "total": 1, "next": None},
    ("get", f"{_M}/workers/{{worker}}"): _WORKER,
    ("delete", f"{_M}/workers/{{worker}}"): _OF_WORKER,
    ("post", f"{_M}/workers/{{worker}}/quarantine"): _OF_WORKER,
    ("post", f"{_M}/workers/{{worker}}/release"): _OF_WORKER,
    ("get", f"{_M}/snapshots"): {"snapshots": [_SNAPSHOT], "next": None},
    ("post", f"{_M}/snapshots"): _SNAPSHOT,
    ("get", f"{_M}/snapshots/{{snapshot}}"): {**_SNAPSHOT, "verified": True},
    ("post", f"{_M}/snapshots/{{snapshot}}/restore"): {"id": "t1-v1200-e3-1", **_RESTORED},
    ("get", f"{_M}/durability"): _DURABILITY,
    ("patch", f"{_M}/durability"): _DURABILITY,
    ("post", f"{_M}/restore"): _RESTORED,
    ("get", f"{_M}/state-dict"): {"version": 1200, "timeline": 1, "optimizers": [{"state": {}, "param_groups": []}], "hooks": []},
    ("put", f"{_M}/state-dict"): {**_RESTORED, "parameters": 4, "buffers": 0, "state": "begun_anew"},
    ("get", f"{_M}/events"): {"events": [_EVENT], "next": None, "log": "a1b2c3d4"},
}  # fmt: skip
# What a dry run says beside `before` and `after`.
DRY_RUN: Final = {"dry_run": True, "before": {"lr": 0.1}, "after": {"lr": 0.05}}


def add_examples(paths: Mapping[str, Mapping[str, dict[str, Any]]]) -> None:
    """Enter the examples into the operations of a description."""
    for (method, path), example in ANSWERS.items():
        operation = paths[path][method]
        made = "201" if "201" in operation["responses"] else "200"
        operation["responses"][made]["content"]["application/json"]["example"] = example
        if made == "201":
            content = operation["responses"]["200"].setdefault("content", {})
            content.setdefault("application/json", {"schema": {}})["example"] = DRY_RUN


def problems_of(status: int) -> dict[str, Any]:
    """An example of each error of the catalogue that is answered with this status, by its code."""
    found = {}
    for code, kind in sorted(CATALOGUE.items()):
        if kind.http_status == status:
            fields = {name: f"<{name}>" for _, name, _, _ in Formatter().parse(kind.template) if name}
            error = kind(kind.template.replace("!r}", "}").format(**fields), **fields)
            found[code] = {"value": to_problem(error)}
    return found
