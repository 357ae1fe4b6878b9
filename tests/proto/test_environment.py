"""Variables that look like settings: a misspelt one is named, and what others put there is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pushstep.proto.environment import SETTINGS, unknown_variables
from pushstep.server.config import Config
from tests.support.processes.forked import workers
from tests.support.servers.harness import RunningServer, refused_start


def test_the_settings_are_the_server_s() -> None:
    assert tuple(Config.model_fields) == SETTINGS


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_not_named(name: str) -> None:
    assert list(unknown_variables({f"PUSHSTEP_{name.upper()}": "1", f"pushstep_{name}": "1"})) == []


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("PUSHSTEP_GPRC", "PUSHSTEP_GRPC"),
        ("PUSHSTEP_LEASES_S", "PUSHSTEP_LEASE_S"),
        ("PUSHSTEP_MAX_MODEL", "PUSHSTEP_MAX_MODELS"),
        ("pushstep_staging", "PUSHSTEP_STAGING_BYTES"),
    ],
)
def test_a_misspelt_one_is_named_with_the_one_that_was_meant(name: str, close: str) -> None:
    (said,) = unknown_variables({name: "1", "PATH": "/bin", "PUSHING": "1"})
    assert said == f"{name} in the environment is no setting and is ignored: {close} is one"


def test_what_is_like_none() -> None:
    (said,) = unknown_variables({"PUSHSTEP_XYZZY": "1"})
    assert said == "PUSHSTEP_XYZZY in the environment is no setting and is ignored"


def test_what_a_service_of_our_name_brings_is_nobody_s_mistake() -> None:
    kubernetes = {
        "PUSHSTEP_SERVICE_HOST": "10.0.0.1",
        "PUSHSTEP_SERVICE_PORT": "7070",
        "PUSHSTEP_SERVICE_PORT_GRPC": "7070",
        "PUSHSTEP_PORT": "tcp://10.0.0.1:7070",
        "PUSHSTEP_PORT_7070_TCP": "tcp://10.0.0.1:7070",
        "PUSHSTEP_PORT_7070_TCP_ADDR": "10.0.0.1",
        "PUSHSTEP_SERVER_SERVICE_HOST": "10.0.0.2",
    }
    assert list(unknown_variables(kubernetes)) == []


def test_both_sides_say_it(server: RunningServer, model_name: str, tmp_path: Path) -> None:
    environment = {"PUSHSTEP_GPRC": "here", "PATH": ""}
    code = (
        "import sys; from pushstep.client import connect\n"
        "for _ in range(2): connect(sys.argv[1], model=sys.argv[2]).close()"
    )
    worker = workers().call(code, server.grpc, model_name, environment=environment)
    assert worker.returncode == 0, worker.stderr
    assert worker.stderr.count("PUSHSTEP_GPRC in the environment is no setting") == 1, "once"
    refused = refused_start(Path(os.devnull), environment=environment)
    assert "PUSHSTEP_GPRC in the environment is no setting" in refused.stderr
