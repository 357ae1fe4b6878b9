"""Answers on their way out: large bodies are counted in the readers' budget while they are sent, in parts.

An answer is kept whole until its reader has taken it. Sent in parts, it makes uvicorn wait for the reader after each.
"""

from __future__ import annotations

from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pushstep.proto.errors import OverBudget

from ...staging.read_budget import ReadBudget

PART_BYTES: Final = 64 << 10


class Outlet:
    """Counts large bodies in the readers' budget. If it is full: OverBudget, before anything is sent."""

    def __init__(self, app: ASGIApp, budget: ReadBudget) -> None:
        self._app = app
        self._budget = budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the application's answer as it is made."""
        head: Message | None = None
        counted_bytes = 0
        refusal: OverBudget | None = None

        async def counted_send(message: Message) -> None:
            nonlocal head, counted_bytes, refusal
            if message["type"] == "http.response.start":
                head = message  # held back until it is known that the budget has room for the body
                return
            body: bytes = message.get("body", b"")
            if head is not None:
                if len(body) > PART_BYTES:
                    # there is no waiting for room: the body takes its memory already
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
            # for the application the answer has begun, so it takes the refusal for a defect
            if refusal is not None:
                raise refusal from None
            raise
        finally:
            self._budget.give_back(counted_bytes)
