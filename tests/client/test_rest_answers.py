"""What commands read of a server's answers: the whole body, and not until the connection ends."""

from __future__ import annotations

import socket
import threading

from pushstep.client.commands.rest import answer_to
from pushstep.client.transport.security import Security

BODY = b'{"models": []}'


def test_a_body_is_read_without_waiting_for_the_connection_s_end() -> None:
    """The server keeps it open for the next request, by default for five seconds."""
    was_read = threading.Event()
    told: list[bool] = []

    def serve(listening: socket.socket) -> None:
        caller, _ = listening.accept()
        with caller:
            caller.recv(1 << 16)
            caller.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY)
            told.append(was_read.wait(30))

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with answer_to(address, "GET", "/v1/models", {}, {}, Security(address)) as answer:
            assert answer.read() == BODY
            was_read.set()
        thread.join()
    assert told == [True]
