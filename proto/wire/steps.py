"""What both ends of a call of TakeSteps agree on."""

from __future__ import annotations

from typing import Final

# A call that waits for its next push for so long is ended by the server. The client opens another one well before.
IDLE_S: Final = 60.0
