"""compose.tls.yaml: what it adds to compose.yaml is known to the programs, and starts a server that asks who calls."""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
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
    free_port,
    healthchecks,
)
from tests.support.access.secured import Authority, TokenFile


class _Loader(yaml.SafeLoader):
    """Compose's own tags are passed over."""


_Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))
OVERLAY: dict[str, Any] = yaml.load((DEPLOY / "compose.tls.yaml").read_text(), _Loader)
ADDED: dict[str, dict[str, Any]] = OVERLAY["services"]


def test_it_changes_services_that_are_there_and_takes_insecure_away() -> None:
    assert set(ADDED) == {"server", *WORKERS} <= set(SERVICES)
    assert ADDED["server"]["command"] == []
    assert not {"volumes", "user", "cap_add", "network_mode"} & {
        key for each in ADDED.values() for key in each
    }
    names = set(OVERLAY["secrets"])
    assert {name for each in ADDED.values() for name in each["secrets"]} == names
    assert {Path(each["file"]).name for each in OVERLAY["secrets"].values()} == names
    for name in names:
        assert f"deploy/secrets/{name}" in README
    assert "secrets" not in COMPOSE
    ignored = (DEPLOY.parent / ".gitignore").read_text()
    assert "deploy/secrets/" in ignored


def test_its_secrets_are_where_the_programs_look_for_them() -> None:
    for name, service in ADDED.items():
        known = SETTINGS if name == "server" else OF_CLIENTS
        for variable, value in service["environment"].items():
            assert variable.removeprefix("PUSHSTEP_").lower() in known
            assert value.removeprefix("/run/secrets/") in service["secrets"]
        assert not any("token" in str(value).lower() for value in service.get("command", ()))
    workers = [service for name, service in ADDED.items() if name != "server"]
    for worker in workers:
        assert worker["entrypoint"][-2:] == ["--token", "@/run/secrets/worker.token"]


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


def test_what_both_files_say_starts_a_server_that_is_healthy_and_asks_who_calls(tmp_path: Path) -> None:
    secrets = Authority(tmp_path / "secrets")
    secrets.issue("server", "server", "localhost", "127.0.0.1")
    tokens = TokenFile(secrets.folder / "tokens")
    set_up = environment("server") | SERVICES["server"]["environment"] | ADDED["server"]["environment"]
    ports = {"7070": str(free_port()), "7071": str(free_port())}
    here = {name: value.replace("/run/secrets", str(secrets.folder)) for name, value in set_up.items()}
    here = {name: re.sub(r"^/data", str(tmp_path / "data"), value) for name, value in here.items()}
    here = {
        name: re.sub(r":(707\d)$", lambda port: f":{ports[port[1]]}", value)
        for name, value in here.items()
        if name.startswith("PUSHSTEP_")  # the caches of compiled kernels stay where they are
    }
    program = Path(sys.executable).with_name("pushstep-server")
    command = [program, *ADDED["server"]["command"]]
    server = subprocess.Popen(command, env=os.environ | here, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("ready ")
        for check in healthchecks().values():
            probe = [sys.executable, *(word.replace(":7071/", f":{ports['7071']}/") for word in check[1:])]
            assert subprocess.run(probe, env=os.environ | here, timeout=60).returncode == 0
        with httpx.Client(
            verify=ssl.create_default_context(cafile=secrets.ca), trust_env=False, timeout=20
        ) as client:
            url = f"https://127.0.0.1:{ports['7071']}/v1/models"
            assert client.get(url).status_code == 401
            assert client.get(url, headers=tokens.headers("viewer")).status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.communicate()
