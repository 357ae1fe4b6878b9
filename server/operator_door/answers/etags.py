"""ETags of what operators edit: strong, the same after an orderly restart, changed by operators' edits alone.

An edit with If-Match is made only on the state that its caller knows.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Header, Response

from ...models.model import Model
from ..header_fields import require_match

IfMatch = Annotated[
    list[str] | None, Header(description="the ETag that the caller knows; another one now: `stale_etag`")
]


def etag_of(model: Model, resource: str) -> str:
    """The ETag of a resource. Another model of this name, or another timeline, has others."""
    return f'"{model.uid[:4].hex()}-{model.timeline}-{model.revisions.of(resource)}"'


def tag(response: Response, model: Model, resource: str) -> None:
    """Have an answer name the ETag of the resource that it shows."""
    response.headers["ETag"] = etag_of(model, resource)


def require_known(if_match: list[str] | None, model: Model, resource: str) -> None:
    """StaleEtag if there is a condition, and the resource has been changed since. Call it right before the edit."""
    require_match(if_match, etag_of(model, resource), resource)
