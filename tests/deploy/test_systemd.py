"""deploy/systemd: what the unit starts, as it starts it, is a server that does what the unit takes it to do.

`make lint` has systemd look at the unit; no systemd runs here, so the confinement itself is not tried.
"""

from __future__ import annotations

import re
import shlex
import signal
import socket
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pushstep.proto.environment import SETTINGS
from pushstep.server.process.exit_status import ExitStatus
from tests.deploy.test_deploy import README
from tests.support.deployments.deployed import (
    DEPLOY,
    NAMES,
    Deployed,
    deployed,
    make_certificate,
    make_token,
    moved,
)
from tests.support.deployments.ports import free_port
from tests.support.servers.harness import wait_until

UNIT = (DEPLOY / "systemd" / "pushstep.service").read_text()
SETTINGS_FILE = (DEPLOY / "systemd" / "pushstep.toml").read_text()


def said(key: str) -> list[str]:
    """What the unit says of a key, each time."""
    return re.findall(rf"^{key}=(.*)$", UNIT, re.MULTILINE)


def one(key: str) -> str:
    (value,) = said(key)
    return value


def test_what_is_written_goes_where_the_unit_lets_it() -> None:
    roots = {"State": "/var/lib/", "Cache": "/var/cache/", "Runtime": "/run/"}
    writable = [roots[kind] + one(f"{kind}Directory") for kind in roots]
    settings = tomllib.loads(SETTINGS_FILE)
    assert settings.keys() <= set(SETTINGS)
    written = [settings["data"], settings["unix"], *re.findall(r"=(/\S+)", one("Environment"))]
    assert all(path.startswith(tuple(writable)) for path in written), written
    read = {settings[name] for name in ("tls_cert", "tls_key", "tokens_file")}
    assert {str(Path(path).parent) for path in read} == {"/etc/pushstep"}
    assert all(f"{one(f'{kind}DirectoryMode')}" == "0700" for kind in roots)
    assert "insecure" not in settings


def test_it_is_started_again_unless_that_cannot_help() -> None:
    assert one("Restart") == "on-failure"
    never = {ExitStatus(int(status)) for status in one("RestartPreventExitStatus").split()}
    assert never == {ExitStatus.BAD_SETTINGS, ExitStatus.DISK_FAILED}
    assert (one("Type"), one("TimeoutStartSec")) == ("notify", "infinity")


def test_the_readme_installs_what_the_unit_names() -> None:
    program, _, config = shlex.split(one("ExecStart"))
    assert f"python3 -m venv {Path(program).parents[1]}" in README
    assert config in README
    assert f"--user-group --home-dir {one('Environment').split('HOME=')[1].split()[0]}" in README
    assert f" {one('User')}\n" in README
    assert one("User") == one("Group")


class Manager:
    """The service manager's end of its socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(60)

    def hears(self) -> str:
        """The next that it is told."""
        return self._socket.recv(4096).decode()

    def close(self) -> None:
        """Hear no more."""
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


@pytest.mark.openssl
def test_the_unit_starts_reloads_and_stops_a_server(tmp_path: Path, manager: Manager) -> None:
    etc = tmp_path / "etc"
    make_certificate(etc, *NAMES)
    make_token(etc, "viewer")
    http, grpc = free_port(), free_port()
    for folder in ("data", "run"):
        (tmp_path / folder).mkdir(mode=0o700)
    places: dict[str, Path | str] = {
        "/opt/pushstep/bin": Path(sys.executable).parent, "/etc/pushstep": etc, "/var/lib/pushstep": tmp_path / "data",
        "/run/pushstep": tmp_path / "run", ":7070": f":{grpc}", ":7071": f":{http}",
    }  # fmt: skip
    (etc / "pushstep.toml").write_text(moved(SETTINGS_FILE, places))
    command = shlex.split(moved(one("ExecStart"), places))
    # the caches of compiled kernels stay where they are
    env = {"PYTHONUNBUFFERED": "1", "NOTIFY_SOCKET": str(manager.path)}
    with deployed(command, env, etc, http) as server:
        assert f"unix={tmp_path / 'run' / 'pushstep.sock'}" in server.ready()
        assert manager.hears() == "READY=1"
        assert server.status() == 401
        assert server.status("viewer") == 200
        reload_reads_tokens(server)
        server.stop(int(one("TimeoutStopSec")))
        assert manager.hears() == "STOPPING=1"


def reload_reads_tokens(server: Deployed) -> None:
    *_, name, process = shlex.split(one("ExecReload"))
    assert process == "$MAINPID"
    make_token(server.secrets, "viewer")
    assert server.status("viewer") == 401
    server.process.send_signal(signal.Signals[f"SIG{name.removeprefix('-')}"])
    wait_until(lambda: server.status("viewer") == 200, 60)
