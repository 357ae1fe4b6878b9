"""The webhook: posts each event at its point to a URL, signed, to hosts on the server's list only.

The request is that of the Standard Webhooks specification: `webhook-id`, `webhook-timestamp` and `webhook-signature`, which
is `v1,` and the HMAC-SHA256, in base64, of "<id>.<timestamp>.<body>". The secret lies in a file on the server that the hook
names; it is read at each event, so it can be changed, and is shown nowhere.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

from pydantic import Field

from pushstep.proto.errors import InvalidHook

from ..coordinator.hooks.hook import Hook, Place, Point
from ..coordinator.settings import Positive, Settings
from .addresses import LONGEST_URL, Allowed, Resolve, Target, resolved

# For all of one request: connecting, sending, and the answer.
TIMEOUT_S: Final = 10.0
MOST_TIMEOUT_S: Final = 60.0
# What is read of an answer: its status says everything.
ANSWER_BYTES: Final = 64 << 10
LONGEST_BODY_BYTES: Final = 64 << 10
SHORTEST_SECRET_BYTES, LONGEST_SECRET_BYTES = 16, 1024


class WebhookSettings(Settings):
    """Where to post, and how it is signed."""

    url: str = Field(
        max_length=LONGEST_URL, description="https://HOST/PATH; HOST is on the server's list (webhook-hosts)"
    )
    secret: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = Field(
        description="the name of a file in the server's folder webhook-secrets, which holds at least 16 bytes"
    )
    every: Positive = Field(1, description="post each n-th event only")
    timeout_s: float = Field(
        TIMEOUT_S, gt=0, le=MOST_TIMEOUT_S, description="how long one request may take in all"
    )


class Webhook(Hook):
    """Posts each event at its point as JSON, signed with HMAC-SHA256. Redirects are not followed; nothing is sent again."""

    name: ClassVar[str] = "webhook"
    kind = "observer"
    points: ClassVar[frozenset[Point]] = frozenset(Point)
    settings_type: ClassVar[type[Settings]] = WebhookSettings
    settings: WebhookSettings
    # a test's own, that resolves to something else each time
    resolve: ClassVar[Resolve] = staticmethod(resolved)

    def __init__(self, hook_id: str, point: Point, settings: WebhookSettings) -> None:
        super().__init__(hook_id, point, settings)
        self._seen = 0
        self._place: Place | None = None

    def prepare(self, place: Place) -> None:
        """InvalidHook if the URL may not be reached, or there is no such secret. Resolves nothing."""
        _allowed(place).target(self.settings.url)
        _secret(place, self.settings.secret)

    def open(self, place: Place) -> None:
        """Begin."""
        self._place = place

    def observe(self, event: Mapping[str, Any]) -> None:
        """Post an event. OSError, InvalidHook, ValueError, HTTPException."""
        self._seen += 1
        if self._place is None or self._seen % self.settings.every:
            return
        body = json.dumps({"hook": self.hook_id, "point": self.point, **event}).encode()
        if len(body) > LONGEST_BODY_BYTES:
            raise ValueError(f"the event takes {len(body)} bytes as JSON")
        allowed = _allowed(self._place)
        target = allowed.target(self.settings.url)
        headers = signed(
            _secret(self._place, self.settings.secret), self._id_of(event), int(time.time()), body
        )
        until_s = time.monotonic() + self.settings.timeout_s
        address = allowed.addresses(target, type(self).resolve)[0]
        status = post(target, address, headers, body, until_s)
        if not 200 <= status < 300:
            raise ConnectionError(f"{target.host} answered {status}")

    def _id_of(self, event: Mapping[str, Any]) -> str:
        """One id for one event, for a receiver that keeps no event twice."""
        place = [event.get(name) for name in ("model", "timeline", "version", "time")]
        return hashlib.sha256(
            json.dumps([self.hook_id, self.point, self._seen, *place]).encode()
        ).hexdigest()[:32]


def signed(secret: bytes, message_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The header fields of a signed message."""
    text = f"{message_id}.{timestamp}.".encode() + body
    signature = base64.b64encode(hmac.new(secret, text, hashlib.sha256).digest()).decode()
    return {
        "content-type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{signature}",
    }


def post(target: Target, address: str, headers: Mapping[str, str], body: bytes, until_s: float) -> int:
    """Post to an address that was checked; the status of the answer. OSError, http.client.HTTPException."""
    connection = _Pinned(target, address, until_s)
    # a receiver that sends a byte now and then keeps every time-out of a single read from running out
    watchdog = threading.Timer(max(0.0, until_s - time.monotonic()), connection.abort)
    watchdog.daemon = True
    watchdog.start()
    try:
        connection.request("POST", target.path, body, {**headers, "host": target.host_field})
        answer = connection.getresponse()
        taken = 0
        while taken < ANSWER_BYTES and (part := answer.read1(4096)):
            taken += len(part)
        connection.require_time()
        return answer.status
    finally:
        watchdog.cancel()
        connection.close()


class _Pinned(http.client.HTTPConnection):
    """A connection to one address, whatever the host of its URL resolves to, with a deadline for all of it."""

    def __init__(self, target: Target, address: str, until_s: float) -> None:
        super().__init__(target.host, target.port)
        self._target = target
        self._address = address
        self._until_s = until_s

    def abort(self) -> None:
        """End every wait on it, from another thread."""
        with contextlib.suppress(OSError):
            if self.sock is not None:
                # not the TLS socket's own: that would take the connection from under the waiting thread
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def require_time(self) -> float:
        """What is left. TimeoutError if that is nothing."""
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the request took too long")
        return left_s

    def connect(self) -> None:
        """Connect to the address, with TLS for https, whose certificate has to be the host's."""
        plain = socket.create_connection((self._address, self._target.port), self.require_time())
        self.sock = plain
        if self._target.scheme == "https":
            name = self._target.host.strip("[]")
            self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=name)


def _allowed(place: Place) -> Allowed:
    return Allowed(place.webhook_hosts, place.webhook_networks)


def _secret(place: Place, name: str) -> bytes:
    """The secret of a name. InvalidHook if there is none; the error says nothing of what is in the file."""
    if place.webhook_secrets is None:
        raise InvalidHook(
            problem="this server has no secrets for webhooks: its setting webhook-secrets names no folder"
        )
    path = Path(place.webhook_secrets) / name
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or not path.is_file():
        raise InvalidHook(problem=f"webhook-secrets has no file {name}")
    try:
        with path.open("rb") as file:
            secret = file.read(LONGEST_SECRET_BYTES + 1).strip()
    except OSError as error:
        raise InvalidHook(problem=f"the secret {name} cannot be read: {error.strerror}") from error
    if not SHORTEST_SECRET_BYTES <= len(secret) <= LONGEST_SECRET_BYTES:
        raise InvalidHook(
            problem=f"the secret {name} has {len(secret)} bytes; it must have {SHORTEST_SECRET_BYTES} to {LONGEST_SECRET_BYTES}"
        )
    return secret
