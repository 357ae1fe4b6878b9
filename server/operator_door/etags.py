"""If-Match, as RFC 9110 has it: an edit is made only on the state that its caller knows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from pushstep.proto.errors import StaleEtag

# Weak tags are read, too, and never match: If-Match compares strongly.
_TAG: Final = re.compile(r'\s*((?:W/)?"[^"]*")\s*(?:,|$)')


def require_match(if_match: Sequence[str] | None, etag: str, what: str) -> None:
    """StaleEtag unless there is no condition, or it is `*`, or one of its tags is the current `etag`."""
    if if_match is None:
        return
    condition = ", ".join(if_match)  # several If-Match headers are one list
    if condition.strip() != "*" and etag not in _TAG.findall(condition):
        raise StaleEtag(what=what, etag=etag)
