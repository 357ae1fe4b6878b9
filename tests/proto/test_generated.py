"""The committed code is what the pinned generator makes of the .proto files, and it runs where we say it runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import google.protobuf
import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor

from pushstep.proto import training_pb2 as pb
from pushstep.proto import types_pb2

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def generate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, folder / "generate.py", *arguments], capture_output=True, text=True, timeout=100
    )


def test_committed_code_is_fresh() -> None:
    checked = generate(PROTO, "--check")
    assert checked.returncode == 0, checked.stderr


def test_check_names_what_is_stale_and_writing_mends_it(tmp_path: Path) -> None:
    copied = tmp_path / "proto"
    shutil.copytree(PROTO, copied, ignore=shutil.ignore_patterns("__pycache__"))
    types = copied / "types.proto"
    types.write_text(types.read_text().replace("uint32 arena = 1 ", "uint32 arena = 14 "))
    (copied / "training_pb2.pyi").unlink()
    stale = generate(copied, "--check")
    assert stale.returncode == 1
    assert re.search(r"stale: training_pb2\.pyi, types_pb2\.py;", stale.stderr), stale.stderr
    assert not (copied / "training_pb2.pyi").exists()
    assert generate(copied).returncode == 0
    assert generate(copied, "--check").returncode == 0


def requirement(name: str, *lists: str) -> str:
    """The version bound of a requirement of the project, such as ">=1.76"."""
    entries = [
        *PROJECT["dependencies"],
        *(e for extra in lists for e in PROJECT["optional-dependencies"][extra]),
    ]
    (found,) = (m[1] for entry in entries if (m := re.fullmatch(rf"{name}([=<>].*)", entry)))
    return found


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_generator_is_pinned_to_the_runtime_floor() -> None:
    """Generated code refuses runtimes older than its generator."""
    pin = requirement("grpcio-tools", "test").removeprefix("==")
    for name in ("grpcio", "grpcio-health-checking", "grpcio-reflection"):
        floor = numbers(requirement(name).removeprefix(">="))
        assert floor == numbers(pin)[: len(floor)], name
    header = (PROTO / "types_pb2.py").read_text()
    (made,) = re.findall(r"# Protobuf Python Version: ([\d.]+)", header)
    assert numbers(requirement("protobuf").removeprefix(">=")) == numbers(made)
    (needed,) = re.findall(
        r"GRPC_GENERATED_VERSION = '([\d.]+)'", (PROTO / "training_pb2_grpc.py").read_text()
    )
    assert needed == pin
    assert numbers(google.protobuf.__version__) >= numbers(made)
    assert numbers(grpc.__version__) >= numbers(needed)


BULK = {"segment": (2, "fixed64"), "offset": (3, "fixed64"), "payload": (15, "bytes")}
TYPES = {
    FieldDescriptor.TYPE_FIXED64: "fixed64",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_MESSAGE: "message",
}


@pytest.mark.parametrize(
    "kind", [pb.PushRequest, pb.PullResponse, pb.UploadRequest], ids=lambda k: k.__name__
)
def test_bulk_fields_are_where_the_codec_writes_them(kind: Any) -> None:
    fields = {f.name: (f.number, TYPES[f.type]) for f in kind.DESCRIPTOR.fields}
    assert fields.pop("header") == (1, "message")
    assert {name: fields.pop(name) for name in BULK} == BULK
    assert fields.pop("header_part") == (5, "bytes")
    assert fields in ({}, {"commit": (4, "message")})
    assert max(f.number for f in kind.DESCRIPTOR.fields) == 15


def test_what_outlives_a_process_keeps_its_numbers() -> None:
    """Receipts lie in snapshots as bytes, and dtypes in frames: a changed number would be read as something else."""
    pinned = {
        "Receipt": "outcome=1 reason=2 identity=3 version=4 staleness=5 gradient_norm=6 clip_factor=7 groups=8 "
        "ignored_edits=9 lead=10 durability=11 times=12 duplicates=13 contributors=14 lr_scale=15 step_norm=16 notes=17 "
        "policy=18 missing_metrics=19 durable_version=20",
        "Identity": "model_uid=1 timeline=2 worker=3 epoch=4 sequence=5",
        "Segment": "arena=1 start=2 stop=3 dtype=4 rows=5 state=6 elements=7 parameter=8",
        "GroupValues": "group=1 values=2 effective_lr=3",
    }
    for name, expected in pinned.items():
        fields = getattr(types_pb2, name).DESCRIPTOR.fields
        assert " ".join(f"{f.name}={f.number}" for f in fields) == expected
    assert dict(types_pb2.DType.items()) == {
        "DTYPE_UNSPECIFIED": 0,
        "DTYPE_FLOAT32": 1,
        "DTYPE_FLOAT64": 2,
        "DTYPE_BFLOAT16": 3,
        "DTYPE_FLOAT16": 4,
        "DTYPE_INT8": 5,
    }
    assert dict(types_pb2.Outcome.items()) == {
        "OUTCOME_UNSPECIFIED": 0,
        "OUTCOME_APPLIED": 1,
        "OUTCOME_SKIPPED": 2,
        "OUTCOME_DROPPED_LATE": 3,
        "OUTCOME_TOO_STALE": 4,
        "OUTCOME_REJECTED": 5,
        "OUTCOME_SUPERSEDED": 6,
    }
