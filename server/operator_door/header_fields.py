"""Header fields of HTTP: If-Match and Content-Encoding as RFC 9110 has them, and digests as RFC 9530 has them.

An edit with If-Match is made only on the state that its caller knows.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from typing import Final

from pushstep.proto.errors import InvalidSettings, StaleEtag

# Weak tags are read, too, and never match: If-Match compares strongly.
_TAG: Final = re.compile(r'\s*((?:W/)?"[^"]*")\s*(?:,|$)')
_WANTED: Final = re.compile(r"(?:^|,)\s*sha-256\s*=\s*([0-9]{1,2})\s*(?:,|$)")
_DIGEST: Final = re.compile(r"(?:^|,)\s*sha-256\s*=\s*:([A-Za-z0-9+/=]{0,100}):\s*(?:,|$)")


def require_match(if_match: Sequence[str] | None, etag: str, what: str) -> None:
    """StaleEtag unless there is no condition, or it is `*`, or one of its tags is the current `etag`."""
    if if_match is None:
        return
    condition = ", ".join(if_match)  # several If-Match headers are one list
    if condition.strip() != "*" and etag not in _TAG.findall(condition):
        raise StaleEtag(what=what, etag=etag)


def is_json(content_type: str) -> bool:
    """True if a body of this type is JSON."""
    return content_type.partition(";")[0].strip().lower() == "application/json"


def codings(fields: Iterable[tuple[bytes, bytes]]) -> str:
    """What a body was packed with, of all Content-Encoding fields, shortened; nothing for one that is as it is."""
    given = b",".join(value for name, value in fields if name == b"content-encoding")
    found = [each.strip() for each in given.decode("latin-1").lower().split(",")]
    return ", ".join(each for each in found if each not in ("", "identity"))[:100]


def wants_digest(wanted: str) -> bool:
    """True if a Want-Repr-Digest field asks for SHA-256. A preference of 0 means: not this one."""
    match = _WANTED.search(wanted)
    return match is not None and int(match[1]) > 0


def digest_header(sha256: bytes) -> str:
    """A Repr-Digest field."""
    return f"sha-256=:{base64.b64encode(sha256).decode()}:"


def claimed_digest(field: str) -> bytes | None:
    """The SHA-256 in a Repr-Digest field; None if it has only others. InvalidSettings if it is no SHA-256."""
    match = _DIGEST.search(field)
    if match is None:
        return None
    try:
        digest = base64.b64decode(match[1], validate=True)
    except binascii.Error:
        digest = b""
    if len(digest) != 32:
        raise InvalidSettings(problem="the sha-256 of Repr-Digest is no SHA-256 in base64")
    return digest
