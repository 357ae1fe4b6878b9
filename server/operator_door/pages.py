"""Keeps pages of other sites out: the checks of Host, Origin and Sec-Fetch-Site.

A page in an operator's browser can have the browser send requests to this address: under another host name, which it has
pointed here, or under the server's own. Where a server asks for no tokens, such a page could steer the models, and have copies
of them made without an end. Programs send none of these fields but Host.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from pushstep.proto.errors import HostNotAllowed

SHOWN: Final = 200
# A name or an address, IPv6 in brackets, and perhaps a port.
_HOST: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:@/]*))(?::[0-9]{0,5})?", re.ASCII)
_READS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_OTHER_SITES: Final = frozenset({b"cross-site", b"same-site"})


def check_host(host: str, allowed: Collection[str] | None) -> None:
    """HostNotAllowed for a foreign name; with `allowed` None, for none.

    Starlette's TrustedHostMiddleware has the same rule, but it answers in plain text, not in the shape of errors,
    and may redirect to "www.". Older versions that FastAPI allows cut "[::1]:7071" at its first colon.
    """
    if allowed is None:
        return
    found = _HOST.fullmatch(host)
    if found is None or (found[1] or found[2] or "").lower() not in allowed:
        raise HostNotAllowed(host=host[:SHOWN])


def check_page(method: str, fields: Sequence[tuple[bytes, bytes]], host: str) -> None:
    """HostNotAllowed for a request that another site's page has the browser send.

    Browsers send Origin with a change. With everything they send what kind of site asks; a link that somebody follows opens
    a document, and is let in.
    """
    if method not in _READS:
        for name, value in fields:
            origin = value.decode("latin-1")
            if name == b"origin" and origin.partition("://")[2].lower() != host.lower():
                raise HostNotAllowed(host=origin[:SHOWN])
    known: Mapping[bytes, bytes] = dict(fields)
    if known.get(b"sec-fetch-site") not in _OTHER_SITES:
        return
    is_link = known.get(b"sec-fetch-mode") == b"navigate" and known.get(b"sec-fetch-dest") == b"document"
    if not (is_link and method in _READS):
        raise HostNotAllowed(host=known.get(b"referer", b"another site").decode("latin-1")[:SHOWN])
