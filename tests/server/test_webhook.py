"""The webhook: signed events at a receiver, and nowhere else: every URL that leads inside is refused, or connected nowhere."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from pushstep.proto.errors import InvalidHook
from pushstep.server.coordinator.hooks.hook import Place, Point
from pushstep.server.observers.addresses import Allowed, Target
from pushstep.server.observers.webhook import Webhook, WebhookSettings, post
from tests.support.servers.harness import RunningServer, running_server, wait_until
from tests.support.servers.operators import add_hook
from tests.support.workers.wire import created

SECRET = b"a secret of forty bytes, or rather thirty"
ONES = {"bias": np.ones(4, np.float32)}
# The hosts that an operator of the server has written down: some of them in good faith, and they resolve to the inside.
HOSTS = (
    "hooks.example.com",
    "hooks.example.com:8443",
    "inside.example.com",
    "8.8.8.8",
    "127.0.0.1",
    "localhost",
    "10.0.0.1",
)
# Each is refused before anything is resolved.
REFUSED = [
    "https://127.0.0.1/",
    "https://localhost:22/",
    "https://10.0.0.1/hook",
    "https://192.168.1.1/",
    "https://172.16.0.1/",
    "https://169.254.169.254/latest/meta-data/",
    "https://100.64.0.1/",
    "https://0.0.0.0/",
    "https://0/",
    "https://255.255.255.255/",
    "https://224.0.0.1/",
    "https://192.0.0.8/",
    "https://198.18.0.1/",
    "https://2130706433/",
    "https://017700000001/",
    "https://0x7f000001/",
    "https://0x7f.0.0.1/",
    "https://0177.0.0.1/",
    "https://127.1/",
    "https://127.0.0.1./",
    "https://127.000.000.001/",
    "https://[::1]/",
    "https://[::]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/",
    "https://[::127.0.0.1]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[2002:7f00:1::]/",
    "https://[2001:0:7f00:1::1]/",
    "https://[fe80::1]/",
    "https://[fc00::1]/",
    "https://[ff02::1]/",
    "https://[::ffff:0:127.0.0.1]/",
    "https://user@hooks.example.com/",
    "https://hooks.example.com@127.0.0.1/",
    "https://user:password@hooks.example.com/",
    "https://hooks.example.com:22/",
    "https://hooks.example.com:443443/",
    "http://hooks.example.com:8080/",
    "https://evil.example.com/",
    "https://hooks.example.com.evil.com/",
    "https://hooks.example.com\\@evil.com/",
    "https://hooks.example.com#@evil.com/",
    "https://hooks%2eexample.com/",
    "https://ⓗooks.example.com/",
    "https://127。0。0。1/",
    "https://hooks.example.com\r\nhost: evil.com/",
    "https://hooks.example.com/\tx",
    " https://hooks.example.com/",
    "https:hooks.example.com/",
    "https:///hooks.example.com/",
    "//hooks.example.com/",
    "file:///etc/passwd",
    "gopher://hooks.example.com/",
    "ftp://hooks.example.com/",
    "HTTPS://hooks.example.com/",
    "https://",
    "",
]
# What a name on the list may resolve to, and is not connected to for it.
INSIDE = [
    ["127.0.0.1"],
    ["10.1.2.3"],
    ["169.254.169.254"],
    ["::1"],
    ["::ffff:10.0.0.1"],
    ["fe80::1%eth0"],
    ["fd00::1"],
    ["64:ff9b::a00:1"],
    ["224.0.0.1"],
    ["0.0.0.0"],
    ["100.64.0.1"],
    ["8.8.8.8", "10.0.0.1"],
    [],
]


def test_the_table_is_long_enough() -> None:
    assert len(set(REFUSED)) >= 40


@pytest.mark.parametrize("url", REFUSED)
def test_a_url_that_leads_elsewhere_is_refused(url: str) -> None:
    with pytest.raises(InvalidHook):
        Allowed(HOSTS).target(url)


def test_what_is_on_the_list_is_allowed() -> None:
    allowed = Allowed(HOSTS)
    assert allowed.target("https://hooks.example.com/a?b=%2f") == Target(
        "https", "hooks.example.com", 443, "/a?b=%2f"
    )
    assert allowed.target("https://hooks.example.com:8443").port == 8443
    assert allowed.target("https://8.8.8.8/").host == "8.8.8.8"


@pytest.mark.parametrize("addresses", INSIDE, ids=str)
def test_a_name_that_leads_inside_is_not_connected_to(addresses: list[str]) -> None:
    allowed = Allowed(HOSTS)
    target = allowed.target("https://inside.example.com/")
    with pytest.raises(InvalidHook):
        allowed.addresses(target, lambda host, port: addresses)


def test_networks_that_the_settings_name_are_allowed() -> None:
    allowed = Allowed(HOSTS, ["10.0.0.0/8", "fd00::/8"])
    target = allowed.target("https://inside.example.com/")
    for address in ("10.1.2.3", "fd00::1"):
        assert allowed.addresses(target, lambda host, port, one=address: [one]) == [address]
    with pytest.raises(InvalidHook):
        allowed.addresses(target, lambda host, port: ["192.168.0.1"])


class Receiver(BaseHTTPRequestHandler):
    """Keeps what is posted to it."""

    seen: ClassVar[list[tuple[str, dict[str, str], bytes]]] = []
    status: ClassVar[int] = 204

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        type(self).seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        self.send_response(type(self).status)
        self.send_header("location", "/elsewhere")
        self.send_header("content-length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def receiver() -> Iterator[int]:
    """The port of a receiver."""
    Receiver.seen.clear()
    Receiver.status = 204
    served = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield served.server_port
    served.shutdown()
    served.server_close()


def place(folder: Path, *hosts: str, networks: tuple[str, ...] = ("127.0.0.0/8",)) -> Place:
    secrets = folder / "secrets"
    secrets.mkdir(exist_ok=True)
    (secrets / "night").write_bytes(SECRET + b"\n")
    return Place("m", folder, hosts, networks, secrets)


def hook(url: str, **settings: Any) -> Webhook:
    return Webhook("webhook-1", Point.STEP_POST, WebhookSettings(url=url, secret="night", **settings))


def is_signed(headers: dict[str, str], body: bytes) -> bool:
    text = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(SECRET, text, hashlib.sha256).digest()).decode()
    return headers["webhook-signature"] == f"v1,{expected}"


def test_events_arrive_signed(tmp_path: Path, receiver: int) -> None:
    """Through REST: the hook is installed, steps are posted, and the secret is nowhere to be seen."""
    here = place(tmp_path)
    options = ["--webhook-hosts", f"127.0.0.1:{receiver}", "--webhook-networks", "127.0.0.0/8"]
    options += ["--webhook-secrets", str(here.webhook_secrets)]
    with running_server(tmp_path / "data", *options) as server:
        session = created(server, "m")
        path = "/v1/models/m/hooks"
        for settings, word in (
            ({"url": f"http://127.0.0.1:{receiver + 1}/", "secret": "night"}, "webhook-hosts"),
            ({"url": f"http://127.0.0.1:{receiver}/", "secret": "day"}, "no file day"),
            ({"url": f"http://127.0.0.1:{receiver}/", "secret": "../night"}, "secret"),
        ):
            body = {"name": "webhook", "point": "step_post", "settings": settings}
            refused = server.rest("POST", path, json=body)
            assert (refused.status_code, refused.json()["code"]) == (422, "invalid_hook")
            assert word in refused.json()["detail"]
        shown = add_hook(
            server,
            "m",
            "webhook",
            "step_post",
            {"url": f"http://127.0.0.1:{receiver}/hook?a=1", "secret": "night"},
        )
        for _ in range(3):
            session.push(ONES, metrics={"loss": 0.5})
        wait_until(lambda: len(Receiver.seen) == 3)
        for version, (where, headers, body) in zip((2, 3, 4), Receiver.seen, strict=True):
            assert where == "/hook?a=1"
            assert is_signed(headers, body)
            assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
            event = json.loads(body)
            assert (event["version"], event["model"], event["metrics"]) == (version, "m", {"loss": 0.5})
        assert len({headers["webhook-id"] for _, headers, _ in Receiver.seen}) == 3
        listed = server.rest("GET", path).json()["hooks"][0]
        assert (listed["failures"], listed["dropped"]) == (0, 0)
        everywhere = json.dumps([shown, listed, server.rest("GET", "/v1/models/m/events").json()])
        text = server.log.read_text()
    assert SECRET.decode() not in everywhere + text
    assert SECRET not in b"".join(p.read_bytes() for p in (tmp_path / "data").rglob("*") if p.is_file())


def test_redirects_and_refusals_are_failures(tmp_path: Path, receiver: int) -> None:
    made = hook(f"http://127.0.0.1:{receiver}/")
    made.open(place(tmp_path, f"127.0.0.1:{receiver}"))
    for status in (301, 302, 307, 404, 500):
        Receiver.status = status
        with pytest.raises(ConnectionError, match=str(status)):
            made.observe({"version": 1})
    assert [where for where, *_ in Receiver.seen] == ["/"] * 5


def test_a_name_that_is_rebound_is_not_followed(tmp_path: Path, receiver: int) -> None:
    """It is resolved once, and what was checked is what is connected to."""
    asked: list[str] = []

    class Rebound(Webhook):
        @staticmethod
        def resolve(host: str, port: int) -> list[str]:
            asked.append(host)
            return ["127.0.0.1"] if len(asked) == 1 else ["10.0.0.1"]

    url = f"http://inside.example.com:{receiver}/"
    made = Rebound("webhook-1", Point.STEP_POST, WebhookSettings(url=url, secret="night"))
    made.open(place(tmp_path, f"inside.example.com:{receiver}"))
    made.observe({"version": 1})
    assert asked == ["inside.example.com"]
    assert Receiver.seen[0][1]["host"] == f"inside.example.com:{receiver}"
    with pytest.raises(InvalidHook):
        made.observe({"version": 2})
    assert len(Receiver.seen) == 1


def drip(connection: socket.socket, until: threading.Event) -> None:
    """Answer with a byte now and then, so that no single read takes long."""
    for byte in b"HTTP/1.1 200 OK\r\nx: " + b"y" * 10_000:
        if until.wait(0.02):
            return
        try:
            connection.send(bytes([byte]))
        except OSError:
            return


def silent(connection: socket.socket, until: threading.Event) -> None:
    until.wait(20)


def endless(connection: socket.socket, until: threading.Event) -> None:
    """An answer without end."""
    try:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while not until.is_set():
            connection.sendall(b"z" * 65536)
    except OSError:
        return


@pytest.mark.parametrize(("receiver_does", "fails"), [(drip, True), (silent, True), (endless, False)])
def test_a_receiver_takes_no_more_time_and_memory_than_it_is_given(
    receiver_does: Callable[[socket.socket, threading.Event], None], fails: bool
) -> None:
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                receiver_does(connection, over)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        target = Target("http", "127.0.0.1", listening.getsockname()[1], "/")
        begun_s = time.monotonic()
        try:
            assert post(target, "127.0.0.1", {}, b"{}", begun_s + 0.5) == 200
            failed = False
        except Exception:  # noqa: BLE001 - whatever it was, it is counted as one failure
            failed = True
        took_s = time.monotonic() - begun_s
        over.set()
        thread.join(60)
    assert failed is fails
    assert took_s < 10


def test_without_a_list_nothing_is_reached(server: RunningServer, model_name: str) -> None:
    created(server, model_name)
    body = {
        "name": "webhook",
        "point": "step_post",
        "settings": {"url": "https://hooks.example.com/", "secret": "night"},
    }
    refused = server.rest("POST", f"/v1/models/{model_name}/hooks", json=body)
    assert (refused.status_code, refused.json()["code"]) == (422, "invalid_hook")
