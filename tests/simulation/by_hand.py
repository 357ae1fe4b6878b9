"""Everything that is on its way, and waits for somebody to say what becomes of it.

In place of network.py and its chances: each message, body and piece of the server's work lies here until it is picked.
"""

from __future__ import annotations

from dataclasses import dataclass

from .loop import Action, SimulatedLoop
from .network import Deliver, Network

# Of a message, once nothing goes wrong any more.
CALM_S = 0.01


@dataclass(frozen=True)
class Loose:
    """One thing that can happen next. What is lost without a trace has nothing that happens then."""

    happens: Action
    worker: str | None = None
    lost: Action | None = None
    comes_once: bool = True


class Hand(Network):
    """Keeps what is on its way in the order in which it was sent."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self.loop = loop
        self.cut: set[str] = set()
        self.counts = {"sent": 0, "dropped": 0, "repeated": 0}
        self.loose: list[Loose] = []
        self._calm = False

    def _take(self, loose: Loose) -> None:
        if self._calm:
            self.loop.after(CALM_S, loose.happens)
        else:
            self.loose.append(loose)

    def send(self, worker: str, deliver: Deliver) -> None:
        """A message from or to `worker`."""
        self.counts["sent"] += 1
        self._take(Loose(deliver, worker, comes_once=False))

    def bring(self, worker: str, whole: Deliver, broken: Deliver) -> None:
        """A push's body; the server notices when it breaks off."""
        self._take(Loose(whole, worker, broken))

    def work(self, kind: str, action: Action) -> None:
        """A piece of the server's own work."""
        self._take(Loose(action))

    def work_off(self) -> None:
        """The server does what it has to."""
        work = [one for one in self.loose if one.worker is None]
        self.loose = [one for one in self.loose if one.worker is not None]
        for one in work:
            one.happens()

    def calm(self) -> None:
        """All that is on its way arrives, and so does what follows."""
        self._calm = True
        self.cut.clear()
        loose, self.loose = self.loose, []
        for one in loose:
            self._take(one)

    # What becomes of the one at a place in the order.

    def let(self, place: int) -> None:
        """It happens; a message that a partition stops is lost."""
        one = self.loose.pop(place)
        if one.worker in self.cut:
            self._lose(one)
        else:
            one.happens()

    def lose(self, place: int) -> None:
        """It does not, if it can be lost: the server's work cannot."""
        if self.loose[place].worker is not None:
            self._lose(self.loose.pop(place))

    def repeat(self, place: int) -> None:
        """A message comes now, and again later."""
        one = self.loose[place]
        if not one.comes_once:
            self.counts["repeated"] += 1
            self.loose.append(one)
            self.let(place)

    def _lose(self, one: Loose) -> None:
        self.counts["dropped"] += 1
        if one.lost is not None:
            one.lost()
