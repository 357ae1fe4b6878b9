"""What a browser sends for another site's page, to a server on this host that asks for no token: refused; a link opens."""

from __future__ import annotations

import pytest

from tests.support.servers.harness import RunningServer
from tests.support.workers.wire import created, untouched

EXPORT, GROUP = "/export", "/param-groups/0"


def sent(site: str, mode: str, dest: str) -> list[tuple[str, str]]:
    return [("Sec-Fetch-Site", site), ("Sec-Fetch-Mode", mode), ("Sec-Fetch-Dest", dest)]


def origins(*values: str) -> list[tuple[str, str]]:
    return [("Origin", value) for value in values]


# A request, its fields, and whether it is let in. OWN stands for the server's own origin.
REQUESTS = {
    "an image": ("GET", EXPORT, sent("cross-site", "no-cors", "image"), False),
    "a script of another port": ("GET", EXPORT, sent("same-site", "cors", "empty"), False),
    "a frame": ("GET", EXPORT, sent("cross-site", "navigate", "iframe"), False),
    "a form": ("POST", "/snapshots", sent("cross-site", "navigate", "document"), False),
    "a link": ("GET", "", sent("cross-site", "navigate", "document"), True),
    "an address that was typed": ("GET", "", sent("none", "navigate", "document"), True),
    "the server's own page": ("GET", "", sent("same-origin", "cors", "empty"), True),
    "a program": ("GET", "", [], True),
    "two origins": ("PATCH", GROUP, origins("http://elsewhere.example", "OWN"), False),
    "two origins, the own one first": ("PATCH", GROUP, origins("OWN", "http://elsewhere.example"), False),
    "the own origin": ("PATCH", GROUP + "?dry_run=true", origins("OWN"), True),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_pages_of_other_sites_reach_nothing(server: RunningServer, model_name: str, case: str) -> None:
    created(server, model_name)
    method, path, fields, is_let_in = REQUESTS[case]
    fields = [(name, value.replace("OWN", f"http://{server.http}")) for name, value in fields]
    body = b'{"lr": 0.25}' if method == "PATCH" else None
    fields.append(("Content-Type", "application/json"))
    with untouched(server, model_name):
        answer = server.rest(method, f"/v1/models/{model_name}{path}", content=body, headers=fields)
        if is_let_in:
            assert answer.status_code == 200, answer.text
        else:
            assert (answer.status_code, answer.json()["code"]) == (403, "host_not_allowed")
