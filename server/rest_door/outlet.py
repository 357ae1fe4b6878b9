"""Answers on their way out: what is large by itself counts while it is sent, and goes out in parts.

An answer is kept whole until its reader has taken it. In parts, uvicorn waits for the reader after each.
"""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pushstep.proto.errors import OverBudget

from ..read_budget import ReadBudget

PART_BYTES: Final = 64 << 10


class Outlet:
    """Counts the bodies of answers in the readers' budget. OverBudget, before anything is sent, where it is full."""

    def __init__(self, app: ASGIApp, budget: ReadBudget) -> None:
        self._app = app
        self._budget = budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send an answer as it is made."""
        head: Message | None = None
        counted_bytes = 0
        refusal: OverBudget | None = None

        async def counted_send(message: Message) -> None:
            nonlocal head, counted_bytes, refusal
            if message["type"] == "http.response.start":
                head = message  # until it is known whether there is room for what follows
                return
            body: bytes = message.get("body", b"")
            if head is not None:
                if len(body) > PART_BYTES:
                    # not waited for: the body is there already
                    if not self._budget.take(len(body)):
                        refusal = self._budget.over(len(body))
                        raise refusal
                    counted_bytes = len(body)
                await send(head)
                head = None
            for at in range(0, max(len(body), 1), PART_BYTES):
                more = message.get("more_body", False) or at + PART_BYTES < len(body)
                await send({**message, "body": body[at : at + PART_BYTES], "more_body": more})

        try:
            await self._app(scope, receive, counted_send)
        except Exception:
            if refusal is not None:  # which the application takes for a defect: to it the answer has begun
                raise refusal from None
            raise
        finally:
            self._budget.give_back(counted_bytes)
