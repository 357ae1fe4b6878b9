"""How much work the event loop does itself: below these limits a hop to a thread costs more than the work."""

from __future__ import annotations

from typing import Final

# Parameters, groups or segments that the event loop looks at itself, at up to 5 us each. For more, a thread is worth its
# 0.15 ms.
INLINE_PARTS: Final = 1000
# Bytes that the event loop copies itself, and bytes of a push that it inspects itself: each takes up to 0.1 ms. An exchange of
# 130,000 float32 takes 4.0 ms of two busy cores with the hops and 2.4 without, one of 64,000 3.0 and 2.0.
INLINE_BYTES: Final = 512 << 10
# The same for a step: the gradients that it reads and the parameters that it writes for a worker on this host.
INLINE_STEP_BYTES: Final = 1 << 20
