"""The page of the error catalogue: each class, its code and its statuses. What to do is in troubleshooting.md."""

from __future__ import annotations

from words import table

from pushstep.proto.errors import CATALOGUE, Broken, InvalidRequest, Misuse, NotFound, Refused, Unavailable

_HEAD = """# Errors

Every failure that pushstep names is a class of `pushstep.proto.errors`, with a `code` that never changes: over gRPC it is the `reason` of the status's `ErrorInfo`, over REST the
problem's `code`, and in Python the class itself. Match on classes or codes, not on messages. [Troubleshooting](../troubleshooting.md) says of each code what it means
and what to do.

"""
_FAMILIES = (InvalidRequest, NotFound, Refused, Unavailable, Broken, Misuse)


def page() -> str:
    """The page."""
    made = _HEAD
    for family in _FAMILIES:
        made += f"## {family.__name__}\n\n{family.__doc__}\n\n"
        rows = [
            [
                f'<a id="{code}"></a>[`{code}`](../troubleshooting.md#{code})',
                f"`{kind.__name__}`",
                "" if kind.http_status == 0 else f"{kind.grpc_status.name}",
                str(kind.http_status or ""),
                (kind.__doc__ or "").splitlines()[0],
            ]
            for code, kind in sorted(CATALOGUE.items())
            if issubclass(kind, family)
        ]
        made += table(["code", "class", "gRPC", "HTTP", "what it is"], rows)
    return made
