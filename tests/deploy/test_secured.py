"""compose.tls.yaml: what it adds to compose.yaml is known to the programs, and starts a server that asks who calls."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pushstep.client.demo.worker import main as worker_main
from pushstep.proto.environment import OF_CLIENTS, SETTINGS
from tests.deploy.test_deploy import (
    COMPOSE,
    DEPLOY,
    README,
    SERVICES,
    WORKERS,
    environment,
    healthchecks,
)
from tests.deploy.test_watching import Prometheus
from tests.support.deployments.deployed import (
    NAMES,
    SERVER,
    Deployed,
    deployed,
    make_certificate,
    make_token,
    moved,
)
from tests.support.deployments.ports import free_port
from tests.support.servers.harness import wait_until


class _Loader(yaml.SafeLoader):
    """Compose's own tags are passed over."""


_Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))
pytestmark = pytest.mark.openssl
OVERLAY: dict[str, Any] = yaml.load((DEPLOY / "compose.tls.yaml").read_text(), _Loader)
ADDED: dict[str, dict[str, Any]] = OVERLAY["services"]


def test_it_changes_services_that_are_there_and_takes_insecure_away() -> None:
    assert set(ADDED) == {"server", "prometheus", *WORKERS} <= set(SERVICES)
    assert ADDED["server"]["command"] == []
    assert not {"volumes", "user", "cap_add", "network_mode"} & {
        key for each in ADDED.values() for key in each
    }
    names = set(OVERLAY["secrets"])
    assert {name for each in ADDED.values() for name in each["secrets"]} == names
    assert {Path(each["file"]).name for each in OVERLAY["secrets"].values()} == names
    assert "secrets" not in COMPOSE
    ignored = (DEPLOY.parent / ".gitignore").read_text()
    assert "deploy/secrets/" in ignored


def test_its_secrets_are_where_the_programs_look_for_them() -> None:
    for name, service in ADDED.items():
        known = SETTINGS if name == "server" else OF_CLIENTS
        for variable, value in service.get("environment", {}).items():
            assert variable.removeprefix("PUSHSTEP_").lower() in known
            assert value.removeprefix("/run/secrets/") in service["secrets"]
        assert not any("token" in str(value).lower() for value in service.get("command", ()))
    for name in WORKERS:
        assert ADDED[name]["entrypoint"][-2:] == ["--token", "@/run/secrets/worker.token"]


def test_each_container_has_the_secrets_of_its_role_alone() -> None:
    """Above all none but the server its key, and nobody the CA's."""
    keys = {name for name, service in ADDED.items() if {"server.key", "tokens"} & set(service["secrets"])}
    assert keys == {"server"}
    assert "ca.key" not in OVERLAY["secrets"]
    assert set(ADDED["prometheus"]["secrets"]) == {"ca.pem", "viewer.token"}


def test_the_worker_takes_a_file_and_never_a_token(tmp_path: Path, capsys: Any) -> None:
    for option in ("secret-token-of-mine", "@" + str(tmp_path / "none")):
        try:
            worker_main(["--server", "localhost:1", "--worker", "w", "--token", option])
        except (SystemExit, FileNotFoundError) as ended:
            assert "secret-token-of-mine" not in str(ended)
        else:
            raise AssertionError(option)
    said = capsys.readouterr().err
    assert "--token @FILE" in said


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("secured")
    secrets = folder / "secrets"
    make_certificate(secrets, *NAMES)
    make_token(secrets, "viewer", SERVER)
    make_token(secrets, "operator")
    assert {path.name for path in secrets.iterdir()} >= set(OVERLAY["secrets"]) - {"worker.token"}
    with deployed([SERVER, *ADDED["server"]["command"]], *settings(folder, secrets)) as server:
        server.ready()
        yield server
        server.stop(grace_s=120)


def settings(folder: Path, secrets: Path) -> tuple[dict[str, str], Path, int]:
    """The variables of both files, with the secrets' folder and the port for operators."""
    http, grpc = free_port(), free_port()
    places = {"/run/secrets": secrets, "/data": folder / "data", ":7070": f":{grpc}", ":7071": f":{http}"}
    set_up = environment("server") | SERVICES["server"]["environment"] | ADDED["server"]["environment"]
    # the caches of compiled kernels stay where they are
    env = {name: moved(value, places) for name, value in set_up.items() if name.startswith("PUSHSTEP_")}
    return env, secrets, http


def test_it_is_healthy_and_asks_who_calls(secured: Deployed) -> None:
    with_tls = os.environ | {"PUSHSTEP_TLS_CERT": "server.pem"}
    for check in healthchecks().values():
        probe = [sys.executable, *(word.replace("127.0.0.1:7071", secured.http) for word in check[1:])]
        assert subprocess.run(probe, env=with_tls, timeout=60).returncode == 0
    assert secured.status() == 401
    assert secured.status("viewer") == 200


def test_secrets_are_closed_to_others_of_this_host_and_open_to_a_container_s_user(secured: Deployed) -> None:
    assert secured.secrets.stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in secured.secrets.iterdir()}
    assert modes.pop("ca.key") == 0o600
    assert set(modes.values()) == {0o644}, modes


def test_a_certificate_is_renewed_and_a_token_replaced_while_it_runs(secured: Deployed) -> None:
    """By the same commands; a bind-mounted file is the same file afterwards."""
    inodes = {path.name: path.stat().st_ino for path in secured.secrets.iterdir()}

    def serial() -> int:
        with secured.client() as client, client.stream("GET", "/healthz") as answer:
            stream = answer.extensions["network_stream"]
            return int(stream.get_extra_info("ssl_object").getpeercert()["serialNumber"], 16)

    before = serial()
    make_certificate(secured.secrets, *NAMES, "another.name")
    wait_until(lambda: serial() != before, 60)

    old = (secured.secrets / "operator.token").read_text()
    make_token(secured.secrets, "operator")
    assert (secured.secrets / "operator.token").read_text() != old
    assert secured.status("operator") == 401, "the server has not been told yet"
    secured.process.send_signal(signal.SIGHUP)
    wait_until(lambda: secured.status("operator") == 200, 60)
    assert secured.status("viewer") == 200
    assert inodes == {path.name: path.stat().st_ino for path in secured.secrets.iterdir()}


@pytest.mark.prometheus
def test_prometheus_reads_it_with_a_viewer_s_token(secured: Deployed) -> None:
    watching = Prometheus(secured.secrets, secured.http, name="prometheus.tls")
    try:
        wait_until(lambda: watching.ask('up{job="pushstep"} == 1 and on () pushstep_ready == 1'), 60)
    finally:
        watching.end()


def test_what_cannot_be_made_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    cases = [
        (["make_token.sh", tmp_path / "s", "nobody", sys.executable, "-c", "exit('no such role')"], 1, "no such role"),
        (["make_certificate.sh", tmp_path / "s", "not a name,"], 1, "DNS:not a name,"),
        (["make_token.sh", tmp_path / "s"], 2, "make_token.sh FOLDER ROLE COMMAND"),
        (["make_certificate.sh", tmp_path / "s"], 2, "make_certificate.sh FOLDER NAME"),
    ]  # fmt: skip
    for (script, *arguments), status, said in cases:
        done = subprocess.run(
            [DEPLOY / str(script), *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout) == (status, "")
        assert said in done.stderr
    assert {path.name for path in (tmp_path / "s").iterdir()} <= {"ca.key", "ca.pem"}


def test_the_readme_says_how_they_are_made() -> None:
    for name in ("make_certificate.sh", "make_token.sh"):
        assert f"deploy/{name} deploy/secrets " in README
