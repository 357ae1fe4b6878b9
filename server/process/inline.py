"""How much work the event loop does itself: below these limits a hop to a thread costs more than the work."""

from __future__ import annotations

from typing import Final

# Parameters, groups or segments that the event loop looks at itself, at up to 5 us each. For more, a thread is worth its
# 0.15 ms.
INLINE_PARTS: Final = 1000
# Bytes that the event loop copies itself, and bytes of a push that it inspects itself.
INLINE_BYTES: Final = 64 << 10
# The same for a step: the gradients that it reads and the parameters that it writes for a worker on this host. An
# exchange of 10,000 float32 takes 1.12 ms with the hop and 1.00 ms without.
INLINE_STEP_BYTES: Final = 128 << 10
