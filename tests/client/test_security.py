"""Tokens and TLS on the caller's side: where they come from, where a token does not go, and what is never shown."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pushstep.client import TLS, connect
from pushstep.client.commands import app
from pushstep.client.transport.security import Security
from pushstep.proto.errors import InvalidSettings, TokenNotSent, Unauthenticated
from tests.support.access.secured import Authority, TokenFile
from tests.support.servers.harness import running_server

TOKEN = "pushstep-abcdefghijklmnopqrstuvwxyz0123456789"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKEN", "TLS_CA", "TLS_CLIENT_CERT", "TLS_CLIENT_KEY"):
        monkeypatch.delenv(f"PUSHSTEP_{name}", raising=False)


SENT = {
    "localhost:7070": True,
    "127.0.0.1:7070": True,
    "[::1]:7070": True,
    "unix:/a/b": True,
    "10.0.0.1:7070": False,
    "example.org:7070": False,
    "localhost.example.org:7070": False,
    "0.0.0.0:7070": False,
    "dns:///localhost:7070": False,
    "ipv4:127.0.0.1:7070": False,
}


@pytest.mark.parametrize("address", SENT)
def test_a_token_goes_without_tls_to_this_host_alone(address: str, tmp_path: Path) -> None:
    if SENT[address]:
        assert Security(address, TOKEN).metadata == (("authorization", f"Bearer {TOKEN}"),)
    else:
        with pytest.raises(TokenNotSent) as caught:
            Security(address, TOKEN)
        assert TOKEN not in caught.value.message
        assert Security(address, TOKEN, insecure=True).metadata is not None
        assert Security(address, TOKEN, tls=True).metadata is not None
        assert Security(address).metadata is None


def test_what_is_not_given_comes_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("worker", "worker")
    monkeypatch.setenv("PUSHSTEP_TOKEN", TOKEN)
    assert Security("localhost:1").headers == {"Authorization": f"Bearer {TOKEN}"}
    assert Security("localhost:1", "").headers == {}
    assert not Security("localhost:1").is_tls
    monkeypatch.setenv("PUSHSTEP_TLS_CA", str(authority.ca))
    monkeypatch.setenv("PUSHSTEP_TLS_CLIENT_CERT", str(cert))
    monkeypatch.setenv("PUSHSTEP_TLS_CLIENT_KEY", str(key))
    made = Security("localhost:1")
    assert made.is_tls
    assert made.credentials() is not None
    assert made._content == (authority.ca.read_bytes(), cert.read_bytes(), key.read_bytes())
    assert not Security("localhost:1", tls=False).is_tls
    assert not Security("unix:/a").is_tls
    assert Security("localhost:1", tls=TLS(ca=authority.ca))._content[1] is None


BAD: dict[str, dict[str, Any]] = {
    "a token of two lines": {"token": f"{TOKEN}\n{TOKEN}"},
    "a token with a space": {"token": f"Bearer {TOKEN}"},
    "no text": {"token": 5},
    "a long token": {"token": "x" * 600},
    "a path for tls": {"tls": "/ca.pem"},
    "a certificate without its key": {"tls": TLS(cert="/cert.pem")},
    "a CA that is not there": {"tls": TLS(ca="/nonexistent/ca.pem")},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_named_before_anything_is_sent(case: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        connect("localhost:1", model="m", **BAD[case])
    assert TOKEN not in caught.value.message


def test_files_are_read_again_when_they_have_changed(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    made = Security("localhost:1", tls=TLS(ca=authority.ca))
    assert not made.renew()
    authority.ca.write_bytes(Authority(tmp_path / "other").ca.read_bytes())
    assert made.renew()
    assert not made.renew()
    authority.ca.unlink()
    assert not made.renew()


def test_nothing_shows_a_token() -> None:
    made = Security("localhost:1", TOKEN)
    assert TOKEN not in f"{made!r} {made}"
    error = Unauthenticated(problem="x")
    assert TOKEN not in str(pickle.loads(pickle.dumps(error)))


def test_commands_take_a_file_and_never_a_token(tmp_path: Path) -> None:
    for command in (["status"], ["export", "x", "--model", "m"], ["import", __file__, "--model", "m"]):
        ended = CliRunner().invoke(app, [*command, "--token", TOKEN])
        assert ended.exit_code == 2
        assert TOKEN not in ended.output
        assert "--token @FILE" in " ".join(ended.output.replace("│", " ").split())
        ended = CliRunner().invoke(app, [*command, "--token", f"@{tmp_path / 'none'}"])
        assert ended.exit_code == 2


def test_commands_reach_a_server_that_asks(tmp_path: Path) -> None:
    """Over TLS, with a viewer's token in a file; the REST address of one that listens everywhere is found."""
    authority, tokens = Authority(tmp_path / "tls"), TokenFile(tmp_path / "tokens")
    file = tmp_path / "viewer"
    file.write_text(tokens.tokens["viewer"] + "\n")
    everywhere = ("--grpc", "0.0.0.0:0", "--http", "0.0.0.0:0")
    options = (*tokens.options(), *authority.server_options(), *everywhere)
    with running_server(tmp_path / "data", *options) as server:
        address = f"127.0.0.1:{server.grpc.rpartition(':')[2]}"
        session = connect(address, model="m", token=tokens.tokens["worker"], tls=authority.tls())
        session.create({"w": np.ones(2, np.float32)})
        asked = ["--token", f"@{file}", "--tls-ca", str(authority.ca)]
        ended = CliRunner().invoke(app, ["status", address, "--json", *asked])
        assert ended.exit_code == 0, ended.output
        assert '"models": ["m"]' in ended.output
        out = tmp_path / "m.safetensors"
        command = ["export", str(out), "--model", "m", "--server", address, *asked]
        ended = CliRunner().invoke(app, command)
        assert ended.exit_code == 0, ended.output
        assert out.is_file()
        command = ["import", str(out), "--model", "m", "--server", address, *asked]
        ended = CliRunner().invoke(app, command)
        assert ended.exit_code == 1
        assert "role operator" in ended.output
        session.close()
