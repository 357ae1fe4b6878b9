"""The bytes that all models together may hold: parameters, optimizer state and extras, against --max-bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from pushstep.proto.errors import OverCapacity


class ModelBudget:
    """Says whether more may be held. What is on its way is promised, so that no two callers get the same room."""

    def __init__(self, max_bytes: int, held_by_models: Callable[[], int]) -> None:
        self._max_bytes = max_bytes
        self._held_by_models = held_by_models
        self._promised_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of --max-bytes that all models take, with what is promised."""
        return self._promised_bytes + self._held_by_models()

    @contextlib.contextmanager
    def promised(self, need_bytes: int) -> Iterator[None]:
        """Reserve room for values that are on their way, for a block. OverCapacity if there is none."""
        self.require_room(need_bytes)
        self._promised_bytes += need_bytes
        try:
            yield
        finally:
            self._promised_bytes -= need_bytes

    def require_room(self, need_bytes: int, promised_bytes: int = 0) -> None:
        """OverCapacity unless `need_bytes` may be held beside what is held and `promised_bytes`."""
        held = self.held_bytes
        if held + promised_bytes + need_bytes > self._max_bytes:
            raise OverCapacity(
                problem=f"{need_bytes} bytes more are needed, {held} of {self._max_bytes} are taken",
                setting="max-bytes",
            )
