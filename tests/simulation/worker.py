"""A worker's side of the protocol, by the rules of client/participant.py.

One process of one worker: it joins, steps, sends what is not answered again under the same identity, joins again when
its lease ran out or its timeline ended, and settles what is in doubt from the receipts that the join brings. Unlike a
session it may have several pushes on their way.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from pushstep.proto.errors import (
    AlreadyJoined,
    Conflict,
    Fenced,
    LeaseExpired,
    NotHeld,
    OutOfOrder,
    PushPending,
    PushstepError,
    Quarantined,
    Superseded,
    TooOld,
    Unavailable,
    UnknownWorker,
)
from pushstep.proto.training_pb2 import GroupEdit, Membership, PushHeader
from pushstep.proto.types_pb2 import GroupValues, Identity, Outcome, Receipt
from pushstep.proto.wire.hyperparameters import plain_values, wire_values
from pushstep.server.coordinator.worker import RECEIPTS_KEPT

from .house import House
from .intent import LAYOUT, Intent
from .loop import SimulatedLoop
from .network import Network
from .server import HOLD_S, LEASE_S, Answer, Stream
from .witness import Violation

ATTEMPT_S = 2.0
RETRY_FOR_S = 25.0
FIRST_WAIT_S = 0.05
LONGEST_WAIT_S = 1.0
# A worker's own scheduler: it halves the lr this often.
STEPS_PER_DECAY = 5


@dataclass
class Habits:
    """How a worker works."""

    think_s: float = 0.3
    window: int = 1
    pulls: float = 0.9
    retry_for_s: float = RETRY_FOR_S
    schedules: bool = False
    # steps and shows that it lives only when told to
    by_hand: bool = False


@dataclass(eq=False)
class Flight:
    """A push that has no answer yet."""

    intent: Intent
    header: PushHeader
    # its answer brings a version
    pulls: bool
    until_s: float
    attempt: int = 0
    wait_s: float = FIRST_WAIT_S
    streams: list[Stream] = field(default_factory=list)


class Process:
    """From its start to its end. What comes for it afterwards is not heard."""

    def __init__(
        self,
        name: str,
        loop: SimulatedLoop,
        network: Network,
        house: House,
        chance: random.Random,
        habits: Habits,
        draw: Callable[[str], Intent | None],
    ) -> None:
        self.name = name
        self.loop = loop
        self.network = network
        self.house = house
        self.chance = chance
        self.habits = habits
        self._draw = draw
        self.alive = True
        self.fenced = False
        self.identity: Identity | None = None
        self.version = 0
        self.groups: list[GroupValues] = []
        self.done = 0
        self.flights: dict[int, Flight] = {}
        self._wanted_lr: float | None = None
        self._join = 0
        self._joining = False
        self._again: list[Intent] = []

    # Its life.

    def start(self, *, takeover: bool = False) -> None:
        """Join, and work."""
        self._ask_to_join(takeover)
        if not self.habits.by_hand:
            self.work()

    def work(self) -> None:
        """Step now and then, and show that it lives."""
        self._think()
        self._beat()

    def crash(self) -> None:
        """End without a word."""
        self.alive = False
        for flight in self.flights.values():
            self._hang_up(flight)

    def leave(self) -> None:
        """End in order; nothing may be on its way."""
        identity, lr = self.identity, self._unsent_lr()
        self.alive = False
        if identity is not None:
            self.network.send(self.name, lambda: self.house.server.leave(identity, lr))

    def _after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.loop.after(delay_s, lambda: action() if self.alive else None)

    def _beat(self) -> None:
        self._after(LEASE_S / 3, self._beat)
        self.beat()

    def beat(self) -> None:
        """Send a sign of life."""
        identity = self.identity
        if identity is not None:
            self.network.send(self.name, lambda: self.house.heartbeat(identity))

    # Joining.

    def _ask_to_join(self, takeover: bool = False, attempt: int = 0) -> None:
        """`attempt`: of an earlier copy of this request."""
        attempt = attempt or self.chance.getrandbits(63) + 1
        self._joining = True
        self._join += 1
        number = self._join
        epoch = None if self.identity is None else int(self.identity.epoch)

        def answer(found: Membership | PushstepError) -> None:
            self.network.send(self.name, lambda: self._joined(number, found, takeover, attempt))

        self.network.send(self.name, lambda: self.house.join(self.name, takeover, epoch, attempt, answer))
        self._after(ATTEMPT_S, lambda: self._ask_to_join(takeover, attempt) if self._join == number else None)

    def _joined(self, number: int, found: Membership | PushstepError, takeover: bool, attempt: int) -> None:
        if not self.alive or number != self._join:
            return
        self._join += 1
        if isinstance(found, Fenced):
            self.fenced = True
            self.crash()
            return
        if isinstance(found, PushstepError):
            wait_s = found.retry_after_s if isinstance(found, AlreadyJoined) else None
            now = self._join
            self._after(
                wait_s or 1.0, lambda: self._ask_to_join(takeover, attempt) if self._join == now else None
            )
            return
        self.identity, self.version = found.identity, found.version
        self.groups, self._joining = list(found.groups), False
        flights, self.flights = list(self.flights.values()), {}
        for flight in flights:
            self._hang_up(flight)
            self._settle_doubt(flight, found)
        again, self._again = self._again, []
        for intent in again:
            self.push(intent)

    def _settle_doubt(self, flight: Flight, found: Membership) -> None:
        old = flight.header.identity
        for receipt in found.receipts:
            if receipt.identity == old:
                self.house.witness.told(receipt.identity, receipt)
                return
        if (old.epoch, old.sequence) <= (found.forgotten_epoch, found.forgotten_sequence):
            flight.intent.fate = "unknown"
        elif old.timeline != found.identity.timeline:
            flight.intent.fate = "superseded"
        else:
            self._again.append(flight.intent)

    # Stepping.

    def _think(self) -> None:
        self._after(self.chance.uniform(0.1, 1.0) * self.habits.think_s, self._think)
        if self.ready:
            self.step()

    @property
    def ready(self) -> bool:
        """Whether it may push."""
        if not self.alive or self.identity is None or self._joining:
            return False
        if len(self.flights) >= self.habits.window:
            return False
        # the oldest one's receipt must still be there when it asks again
        return not self.flights or self._next() < min(self.flights) + RECEIPTS_KEPT

    def step(self) -> None:
        """Push something new."""
        intent = self._draw(self.name)
        if intent is not None:
            self.push(intent)
        elif not self.flights:
            self.leave()  # or a round would wait for it

    def push(self, intent: Intent) -> None:
        """Under its next sequence."""
        assert self.identity is not None
        identity = Identity()
        identity.CopyFrom(self.identity)
        identity.sequence = self._next()
        header = PushHeader(
            model="m",
            identity=identity,
            base_version=self.version,
            manifest_hash=LAYOUT.manifest_hash,
            segments=intent.segments(),
            skip=intent.skip,
            samples=intent.samples,
            hold_s=HOLD_S,
            edits=self._edits(),
        )
        intent.identities.append(identity)
        self.house.witness.comes(identity, intent)
        pulls = self.chance.random() < self.habits.pulls
        flight = Flight(intent, header, pulls, self.loop.now_s + self.habits.retry_for_s)
        self.flights[int(identity.sequence)] = flight
        self._attempt(flight)

    def _next(self) -> int:
        sequence = 0 if self.identity is None else int(self.identity.sequence)
        return max((*self.flights, sequence)) + 1

    def _edits(self) -> list[GroupEdit]:
        lr = self._unsent_lr()
        return [] if lr is None else [GroupEdit(group=0, values=wire_values({"lr": lr}))]

    def _unsent_lr(self) -> float | None:
        """What its scheduler made of the lr, as a difference from what the server said last."""
        lr = plain_values(self.groups[0].values)["lr"] if self.groups else None
        return None if self._wanted_lr == lr else self._wanted_lr

    def _attempt(self, flight: Flight) -> None:
        if not self._is_open(flight):
            return
        flight.attempt += 1
        attempt = flight.attempt

        def reply(answer: Answer) -> None:
            self.network.send(self.name, lambda: self._answered(flight, attempt, answer))

        def arrive() -> None:
            stream = self.house.push(flight.header, flight.pulls, reply)
            flight.streams.append(stream)
            if not flight.header.held_digest:
                self.network.bring(
                    self.name, lambda: self.house.body(self.name, stream, flight.intent), stream.break_off
                )

        self.network.send(self.name, arrive)
        self._after(ATTEMPT_S, lambda: self._no_answer(flight, attempt))

    def _is_open(self, flight: Flight) -> bool:
        return self.flights.get(int(flight.header.identity.sequence)) is flight and not self._joining

    def _no_answer(self, flight: Flight, attempt: int) -> None:
        if self._is_open(flight) and flight.attempt == attempt:
            self._hang_up(flight)
            self._retry(flight, None)

    def _hang_up(self, flight: Flight) -> None:
        """Break the connection: the server is told, now or when the network gets round to it."""
        streams, flight.streams = flight.streams, []
        for stream in streams:
            self.network.send(self.name, stream.break_off)

    def _retry(self, flight: Flight, asked_s: float | None) -> None:
        if self.loop.now_s > flight.until_s:  # a new epoch makes sure that it is not applied from here on
            self._rejoin()
            return
        pause_s = max(asked_s or 0.0, flight.wait_s * self.chance.uniform(0.5, 1.0))
        flight.wait_s = min(2 * flight.wait_s, LONGEST_WAIT_S)
        flight.attempt += 1  # an answer that comes yet is not heard
        self._after(pause_s, lambda: self._attempt(flight))

    def _answered(self, flight: Flight, attempt: int, answer: Answer) -> None:
        if answer.receipt is not None:
            self.house.witness.told(answer.receipt.identity, answer.receipt)
        if not self.alive or not self._is_open(flight) or flight.attempt != attempt:
            return
        flight.streams.clear()
        if answer.receipt is not None:
            self._close(flight)
            self._learn(answer.receipt, answer.version if flight.pulls else 0)
            return
        assert answer.error is not None
        self._refused(flight, answer.error)

    def _learn(self, receipt: Receipt, version: int) -> None:
        self.done += 1
        self.groups = list(receipt.groups) or self.groups
        if version:
            self.version = max(self.version, version, int(receipt.version))
        if receipt.outcome != Outcome.OUTCOME_APPLIED:
            return
        lr = float(plain_values(self.groups[0].values)["lr"])
        if not self._edits_pending(lr):
            self._wanted_lr = None
        if self.habits.schedules and self.done % STEPS_PER_DECAY == 0:
            self.decay()

    def decay(self) -> None:
        """Its scheduler halves the lr."""
        if self.groups:
            self._wanted_lr = float(plain_values(self.groups[0].values)["lr"]) / 2

    def _edits_pending(self, lr: float) -> bool:
        return self._wanted_lr is not None and self._wanted_lr < lr and bool(self.flights)

    def _close(self, flight: Flight) -> None:
        sequence = int(flight.header.identity.sequence)
        self.flights.pop(sequence, None)
        assert self.identity is not None
        self.identity.sequence = max(int(self.identity.sequence), sequence)

    def _refused(self, flight: Flight, error: PushstepError) -> None:
        match error:
            case PushPending():
                flight.header.held_digest = int(error.fields["digest"])
                flight.wait_s = FIRST_WAIT_S
                self._retry(flight, 0.0)
            case NotHeld():
                flight.header.held_digest = 0
                self._retry(flight, 0.0)
            case Superseded() | LeaseExpired() | UnknownWorker():
                self._rejoin()
            case Fenced():
                self.fenced = True
                self.crash()
            case Quarantined():
                self._set_aside()
            case Unavailable() | OutOfOrder():
                self._retry(flight, error.retry_after_s)
            case Conflict() | TooOld():
                raise Violation(f"{self.name} is told {error.code}: {error.message}")
            case _ if error.consumed:
                flight.intent.fate = "not applied"
                self._close(flight)
            case _:
                raise Violation(f"{self.name} is told {error.code}: {error.message}")

    def _rejoin(self) -> None:
        if not self._joining:
            self._ask_to_join()

    def _set_aside(self) -> None:
        """Quarantined: what was on its way may or may not have been stepped. An operator starts it again."""
        self.crash()
