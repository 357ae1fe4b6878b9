"""Fake time: what is due next, in an order that depends on nothing but what was put in."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class Agenda:
    """A clock that jumps from one event to the next."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Action]] = []
        self._count = 0

    def after(self, delay_s: float, action: Action) -> None:
        """Let `action` happen so much later."""
        self._count += 1
        heapq.heappush(self._due, (self.now_s + max(0.0, delay_s), self._count, action))

    def advance(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> bool:
        """Let everything happen that is due within `seconds`, or until it is `enough`; whether it was."""
        until_s = self.now_s + seconds
        while not enough():
            if not self._due or self._due[0][0] > until_s:
                self.now_s = until_s
                return enough()
            self.now_s, _, action = heapq.heappop(self._due)
            action()
        return True
