"""Servers started as deploy/ says: its settings with paths and ports of the test's own, its secrets made by its scripts."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.support.source_tree import ROOT

DEPLOY = ROOT / "deploy"
SERVER = Path(sys.executable).with_name("pushstep-server")
NAMES = ("server", "localhost", "127.0.0.1")
# as `pushstep-server --make-token ROLE`, without what a server imports
MAKES_TOKENS = (sys.executable, "-c", """
import sys
from pushstep.server.access.roles import Role
from pushstep.server.access.tokens import line_of, made_token
token, role = made_token(), sys.argv[-1]
print(token, line_of(token, role, Role(role)), sep=chr(10))
""")  # fmt: skip


def make_certificate(secrets: Path, *names: str) -> None:
    """As an operator does it."""
    subprocess.run([DEPLOY / "make_certificate.sh", secrets, *names], check=True, timeout=60)


def make_token(secrets: Path, role: str, *command: str | Path) -> None:
    """As an operator does it; `command` is what makes tokens, or something quicker."""
    command = command or MAKES_TOKENS
    subprocess.run([DEPLOY / "make_token.sh", secrets, role, *command], check=True, timeout=60)


def moved(text: str, places: Mapping[str, Path | str]) -> str:
    """A setting with each of the places in it, longest first, in another."""
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, str(places[place]))
    return text


@dataclass
class Deployed:
    """A server with TLS and tokens, and where it is."""

    process: subprocess.Popen[str]
    secrets: Path
    http: str

    def client(self, role: str = "") -> httpx.Client:
        """One who knows the CA, with the token of a role or none."""
        context = ssl.create_default_context(cafile=self.secrets / "ca.pem")
        context.verify_flags |= ssl.VERIFY_X509_STRICT  # Python's default from 3.13 on
        token = (self.secrets / f"{role}.token").read_text().strip() if role else ""
        headers = {"Authorization": f"Bearer {token}"} if role else {}
        return httpx.Client(
            base_url=f"https://{self.http}", verify=context, headers=headers, trust_env=False, timeout=20
        )

    def status(self, role: str = "") -> int:
        """What one who would see the models is answered."""
        with self.client(role) as client:
            return client.get("/v1/models").status_code

    def ready(self) -> str:
        """The line that the server says once it is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready "), line
        return line

    def stop(self, grace_s: float) -> None:
        """As whoever has started it does: SIGTERM, and the end in order within the grace."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(grace_s) == 0


@contextlib.contextmanager
def deployed(
    command: Sequence[str | Path], env: Mapping[str, str], secrets: Path, http_port: int
) -> Iterator[Deployed]:
    """A server's process for the length of a block; the block waits until it is ready, and stops it."""
    kept = {
        name: value for name, value in os.environ.items() if not re.match(r"PUSHSTEP_|NOTIFY_SOCKET", name)
    }
    process = subprocess.Popen(command, env=kept | dict(env), stdout=subprocess.PIPE, text=True)
    try:
        yield Deployed(process, secrets, f"127.0.0.1:{http_port}")
    finally:
        process.kill()
        process.communicate()
