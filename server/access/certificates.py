"""The certificates of both doors, and their renewal: new files are used for new connections, without a restart.

The files are looked at every LOOK_S, and at once when the server is told to reload. They are used only if they fit each
other; otherwise what was used before stays, and the log says why. A connection that is open keeps the certificate
that it began with.

gRPC asks for its certificate before each handshake, in a thread of its own. HTTP takes the newest SSL context for
each connection. Either speaks TLS 1.2 or newer, with ciphers that keep past connections secret.
"""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

log = logging.getLogger("pushstep.access")
LOOK_S: Final = 1.0
# Of TLS 1.2; those of 1.3 are all as good. gRPC has the same by itself.
CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"


def require_usable(cert: Path | None, key: Path | None, client_ca: Path | None) -> None:
    """ValueError unless these files can serve together; None for all three is no TLS."""
    if (cert is None) != (key is None):
        raise ValueError("--tls-cert and --tls-key go together")
    if cert is None or key is None:
        if client_ca is not None:
            raise ValueError("--tls-client-ca goes with --tls-cert and --tls-key")
        return
    try:
        Loaded(Files(cert, key, client_ca))
    except OSError as error:
        raise ValueError(str(error)) from None


@dataclass(frozen=True)
class Files:
    """Where the certificates are, as PEM."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def read(self) -> tuple[bytes, bytes, bytes | None]:
        """What is in the files. OSError, with a message for the operator."""
        return (
            _content(self.cert),
            _content(self.key),
            None if self.client_ca is None else _content(self.client_ca),
        )


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}") from None


class Loaded:
    """One set of certificates, as each door takes it."""

    def __init__(self, files: Files) -> None:
        """OSError, with a message for the operator, if a file cannot be read or does not fit the others."""
        self.content = files.read()
        self.context = _context(files)
        if files.read() != self.content:
            raise OSError(f"{files.cert}, or a file beside it, changed while it was read")
        cert, key, client_ca = self.content
        self.for_grpc = grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)


def _context(files: Files) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        # a key with a passphrase would have OpenSSL ask the terminal for it
        context.load_cert_chain(files.cert, files.key, password=lambda: "")
    except ssl.SSLError as error:
        raise OSError(
            f"{files.cert} and {files.key} are no certificate and its key: {error.reason}"
        ) from None
    if files.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(files.client_ca)
        except ssl.SSLError as error:
            raise OSError(f"{files.client_ca} has no certificates of CAs: {error.reason}") from None
    return context


class Certificates:
    """The certificates that are used now."""

    def __init__(self, files: Files) -> None:
        """OSError if they cannot be used."""
        self._files = files
        self._lock = threading.Lock()
        self._loaded = Loaded(files)
        # what gRPC has been given
        self._given = self._loaded
        # what was found in the files when they could not be used, so that it is logged once
        self._refused: object = None

    def context(self) -> ssl.SSLContext:
        """What a new HTTP connection is served with."""
        return self._loaded.context

    def for_grpc(self) -> grpc.ServerCredentials:
        """What gRPC serves with; it comes back by itself for newer ones. For one port."""
        newer: Any = self._newer  # None is "no change", which the stubs do not know
        return grpc.dynamic_ssl_server_credentials(
            self._loaded.for_grpc,
            newer,
            require_client_authentication=self._files.client_ca is not None,
        )

    def _newer(self) -> grpc.ServerCertificateConfiguration | None:
        with self._lock:
            if self._given is self._loaded:
                return None
            self._given = self._loaded
            return self._given.for_grpc

    def look(self) -> None:
        """Use what is in the files now, if it is new and can be used. In a thread: it reads."""
        try:
            found = self._files.read()
            if found == self._loaded.content:
                return
            loaded = Loaded(self._files)
        except OSError as error:
            if self._refused != str(error):
                self._refused = str(error)
                log.error("the certificates stay as they are: %s", error)
            return
        with self._lock:
            self._loaded = loaded
        self._refused = None
        log.info("new certificates are used from now on")
