"""What servers that ask who calls are tested with: tokens in a file, and certificates of a CA of the test's own."""

from __future__ import annotations

import datetime
import os
import signal
from pathlib import Path

import trustme

from pushstep.client import TLS
from pushstep.server.access.roles import Role
from pushstep.server.access.tokens import line_of, made_token
from tests.support.servers.harness import RunningServer

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


class TokenFile:
    """Tokens by name, in a file. Every role has one of its name from the beginning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens: dict[str, str] = {}
        self._lines: dict[str, str] = {}
        for role in Role:
            self.add(role.value, role)

    def add(self, name: str, role: Role, models: str = "", workers: str = "") -> str:
        """One more token."""
        token = self.tokens[name] = made_token()
        self._lines[name] = line_of(token, name, role, models, workers)
        self._write()
        return token

    def take_back(self, name: str) -> None:
        """One less."""
        del self._lines[name]
        self._write()

    def _write(self) -> None:
        content = "\n".join(self._lines.values()) + "\n"
        beside = self.path.with_suffix(".new")
        beside.write_text(content)
        beside.replace(self.path)

    def options(self) -> tuple[str, ...]:
        """Of a server that has these tokens."""
        return "--tokens-file", str(self.path)

    def headers(self, name: str) -> dict[str, str]:
        """Of a request with one of the tokens."""
        return {"Authorization": f"Bearer {self.tokens[name]}"}

    def metadata(self, name: str) -> tuple[tuple[str, str], ...]:
        """Of a call with one of the tokens."""
        return (("authorization", f"Bearer {self.tokens[name]}"),)


def reload(server: RunningServer) -> None:
    """Have a server read its tokens and certificates anew."""
    os.kill(server.process.pid, signal.SIGHUP)


class Authority:
    """A CA, and the files that it issues, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ca = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.ca))

    def issue(self, name: str, *hosts: str, expired: bool = False) -> tuple[Path, Path]:
        """A certificate and its key, in files of this name, in place of those that are there."""
        until = NOW - DAY if expired else NOW + DAY
        made = self._ca.issue_cert(
            *(hosts or ("localhost", "127.0.0.1")), not_before=NOW - 2 * DAY, not_after=until
        )
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        key.write_bytes(made.private_key_pem.bytes())
        cert.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
        return cert, key

    def server_options(self, *, asks: bool = False, **how: bool) -> tuple[str, ...]:
        """Of a server with a certificate of this CA. `asks`: its callers need one, too."""
        cert, key = self.issue("server", **how)
        options = ("--tls-cert", str(cert), "--tls-key", str(key))
        return (*options, "--tls-client-ca", str(self.ca)) if asks else options

    def tls(self, own: tuple[Path, Path] | None = None) -> TLS:
        """Of a client that believes this CA, and shows a certificate."""
        cert, key = own or (None, None)
        return TLS(ca=self.ca, cert=cert, key=key)
