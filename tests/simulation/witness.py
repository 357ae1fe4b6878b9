"""What must never happen, checked at every decision against books of its own.

The witness keeps who joined when, whose clock stands where, and the story: which intents made which version. It takes
from the coordinator only what is asked of it: the decisions, and who counts as a member.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pushstep.proto.training_pb2 import PushHeader
from pushstep.proto.types_pb2 import Identity, Outcome, Receipt
from pushstep.proto.wire.hyperparameters import plain_values
from pushstep.server.arenas.arena import Arenas
from pushstep.server.coordinator.coordinator import Coordinator
from pushstep.server.coordinator.decision import Decision, Offer, Reduce, Resolve, Step
from pushstep.server.coordinator.policies.asynchronous import AsyncSettings
from pushstep.server.coordinator.policies.bounded import BoundedSettings
from pushstep.server.coordinator.policies.policy import Policy
from pushstep.server.coordinator.policies.synchronous import SyncSettings
from pushstep.server.coordinator.push import PendingPush
from pushstep.server.coordinator.sessions import LAST_SEQUENCE
from pushstep.server.coordinator.worker import Worker

from .intent import Intent, times_applied
from .loop import SimulatedLoop
from .rounds import Awaited, ClosedRound, Lateness
from .story import Books, Chapter, Key, Replay, key_of

# What a wait may take beyond the lease or the time-out that bounds it: messages, adding up, and the clock's grain.
SLACK_S = 2.0
# Without a time-out a round waits for whoever is there: for its thinking, and for a network that loses what it sends.
SLOWEST_S = 45.0


class Violation(AssertionError):
    """Something that must never happen has."""


def require(holds: bool, what: str) -> None:
    """Violation unless it holds."""
    if not holds:
        raise Violation(what)


class Witness:
    """Sees everything and forgets nothing."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self.loop = loop
        self.intents: dict[Key, Intent] = {}
        # of the state as it is; and every version that ever was
        self.books = Books()
        self._replay = Replay()
        self.chapters: dict[tuple[int, int], Chapter] = {}
        self.timeline = 1
        self.receipts: dict[Key, bytes] = {}
        self.epochs: dict[str, int] = {}
        self.join_order: dict[str, int] = {}
        self.evicted: set[tuple[int, str, int]] = set()
        self.outcomes: dict[str, int] = {}
        self.last_heard_s: dict[str, float] = {}
        self._lateness = Lateness()
        self._joins = 0
        # epochs, by the number of the join that got them on a timeline; and each name's newest
        self._attempts: dict[tuple[int, int], int] = {}
        self._newest: dict[tuple[int, str], int] = {}
        # the epochs of sessions that were evicted, or whose name another one has taken
        self.fenced: set[tuple[str, int]] = set()

    def attend(self, coordinator: Coordinator) -> None:
        """Watch a server process from its start."""
        self.coordinator = coordinator
        self._began_s = self._changed_s = self.loop.now_s
        # under `bounded`: the policy that counts, and each clock by name and epoch
        self.clocks: dict[tuple[str, int], int] = {}
        self._counting: object = coordinator.policy
        self._admitted: dict[Key, tuple[object, int]] = {}
        # the policy after the last event: it may have been another one that this event ended
        self._policy: Policy = coordinator.policy
        self._closed: ClosedRound | None = None
        self._awaited = Awaited()
        self._waits: dict[Key, float] = {}
        self._waits_under: object = None

    def comes(self, identity: Identity, intent: Intent) -> None:
        """A push has come whole."""
        require(self.intents.setdefault(key_of(identity), intent) is intent, "two pushes have one identity")

    def joined(self, worker: Worker, attempt: int, old_epoch: int) -> None:
        """A membership was handed out; to a session that had `old_epoch`, if it had one."""
        given = (worker.name, worker.epoch)
        require(given not in self.fenced, f"{worker.name} is given its fenced epoch {worker.epoch} again")
        got = self._attempts.get((self.timeline, attempt), 0)
        if got and (got, LAST_SEQUENCE) > worker.forgotten:  # or it was forgotten whole, this join too
            require(got == worker.epoch, f"{worker.name}'s join came again and got another epoch")
            return
        self._attempts[self.timeline, attempt] = worker.epoch
        newest = self._newest.get((self.timeline, worker.name), 0)
        require(worker.epoch > newest, f"{worker.name}'s epoch {worker.epoch} came again")
        self._newest[self.timeline, worker.name] = worker.epoch
        if (old_epoch, LAST_SEQUENCE) > worker.forgotten:
            back = (worker.name, old_epoch) in self.fenced
            require(not back, f"{worker.name} is fenced and has joined again")
        if not old_epoch:
            self.fenced |= {(worker.name, epoch) for epoch in range(1, worker.epoch)}
        self._joins += 1
        self.join_order[worker.name] = self._joins
        self.epochs[worker.name] = worker.epoch

    def reminded(self, worker: Worker, receipts: Sequence[Receipt]) -> None:
        """What a worker that joins is told of its pushes is what has become of them, restores included."""
        held = {
            key
            for chapter in self.story
            if not chapter.undone
            for key in chapter.keys
            if key[1] == worker.name
        }
        told = {key_of(receipt.identity): receipt.outcome for receipt in receipts}
        for key, outcome in told.items():
            require((outcome == Outcome.OUTCOME_APPLIED) == (key in held), f"{key} is told {outcome}")
        for key in held - told.keys():
            require(key[2:] <= worker.forgotten, f"{key} was applied, and its worker is not told")

    def heard(self, name: str) -> None:
        """Something of a worker has arrived."""
        self.last_heard_s[name] = self.loop.now_s

    @property
    def story(self) -> list[Chapter]:
        """Of the state as it is."""
        return self.books.story

    def goes_back(self, books: Books, timeline: int) -> None:
        """A restore, or a start."""
        require(timeline >= self.timeline, "a timeline came again")
        self.books, self.timeline = books.copy(), timeline
        self.books.applied = {i for c in self.story if not c.undone for i, _ in c.intents}
        self._closed = None  # what was being added up never will be

    def patched(self, lr: float, *, held: bool) -> None:
        """An operator has set the lr."""
        self.books.lr, self.books.held = lr, held

    # What is done about decisions.

    def steps(self, version: int, arenas: Arenas) -> None:
        """A ticket is about to be executed: in the order of the versions, each once."""
        require(
            version == arenas.version + 1, f"version {version} is stepped behind version {arenas.version}"
        )

    def resolved(self, resolve: Resolve, arenas: Arenas) -> None:
        """A push is about to be answered."""
        receipt = None if resolve.decided is None else resolve.decided.receipt
        if receipt is None or receipt.outcome != Outcome.OUTCOME_APPLIED:
            return
        if arenas.timeline == receipt.identity.timeline:
            early = arenas.version < receipt.version
            require(
                not early, f"version {receipt.version} of {receipt.identity.worker} is told before its step"
            )

    def exchanged(self, receipt: Receipt, version: int) -> None:
        """An exchange has been answered with a version of the timeline of its push."""
        if receipt.outcome == Outcome.OUTCOME_APPLIED:
            worker, stepped = receipt.identity.worker, receipt.version
            require(version >= stepped, f"{worker}'s step to {stepped} is answered with version {version}")

    def gave_up(self, worker: str, since_s: float) -> None:
        """Somebody who waits for a change since then has waited in vain."""
        happened = since_s < self._changed_s < self.loop.now_s
        require(not happened, f"{worker} was not woken by what happened at {self._changed_s:.3f}")

    # Clocks of `bounded`.

    def _slowest(self) -> int:
        """Newcomers start at the slowest clock; who is not there does not count."""
        if self._counting is not self.coordinator.policy:
            self._counting, self.clocks = self.coordinator.policy, {}
        present = [(worker.name, worker.epoch) for worker in self.coordinator.sessions.members()]
        self.clocks = {who: self.clocks[who] for who in present if who in self.clocks}
        slowest = min(self.clocks.values(), default=0)
        for who in present:
            self.clocks.setdefault(who, slowest)
        return slowest

    def offered(self, header: PushHeader, offer: Offer) -> None:
        """The fastest worker waits exactly when it must; of an epoch that is over nothing is let in."""
        self._is_current(header.identity)
        settings = self.coordinator.policy.settings
        worker = self.coordinator.sessions.workers[header.identity.worker]
        sequence = int(header.identity.sequence)
        if (
            not isinstance(settings, BoundedSettings)
            or sequence <= worker.sequence
            or sequence in worker.undecided
        ):
            require(offer is Offer.READ, f"{header.identity.worker} waits for nothing")
            return
        slowest = self._slowest()
        clock = self.clocks.get((worker.name, worker.epoch), slowest)
        ahead = clock + sequence - 1 - worker.sequence - slowest
        require(
            (offer is Offer.READ) == (ahead <= settings.bound),
            f"{worker.name} is {ahead} clocks ahead, the bound is {settings.bound}: {offer}",
        )
        # a copy that has to wait says nothing of one that was let in under another policy
        if offer is Offer.READ:
            self._admitted[key_of(header.identity)] = self.coordinator.policy, settings.bound

    # Decisions.

    def decided(self, decisions: Sequence[Decision]) -> None:
        """In the order in which they were made."""
        self._changed_s = self.loop.now_s
        self._lateness.note(self.coordinator.policy)
        for decision in decisions:
            match decision:
                case Reduce():
                    self._round(decision)
                case Step():
                    self._step(decision)
                case Resolve():
                    self._settle(decision)
                case _:
                    pass
        self._slowest()
        self._note_awaited()
        self._policy = self.coordinator.policy
        self._nobody_hangs()

    def _note_awaited(self) -> None:
        closed, sessions = self._closed, self.coordinator.sessions
        waits = any(
            not (closed is not None and closed.holds(pending))
            for worker in sessions.workers.values()
            for pending in worker.undecided.values()
        )
        self._awaited.note(sessions.members(), self.loop.now_s, waits=waits)

    def _settle(self, resolve: Resolve) -> None:
        if self._closed is not None and not self._closed.goes_on(resolve):
            self._closed = None
        if resolve.decided is None:
            self.outcomes["dropped"] = self.outcomes.get("dropped", 0) + 1
            return
        receipt = resolve.decided.receipt
        require(receipt.outcome != Outcome.OUTCOME_APPLIED, "applied without a step")
        if receipt.outcome == Outcome.OUTCOME_DROPPED_LATE:
            self._check_late(resolve.pending)
        elif receipt.outcome == Outcome.OUTCOME_TOO_STALE:
            self._check_too_stale(int(receipt.version) - resolve.pending.header.base_version)
        self._consumed(resolve.pending, Outcome.Name(receipt.outcome), int(receipt.version))

    def _consumed(self, pending: PendingPush, outcome: str, version: int) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1
        self._lateness.told(pending, version)
        key, who = key_of(pending.identity), (pending.worker, int(pending.identity.epoch))
        policy, bound = self._admitted.get(key, (None, 0))
        slowest = self._slowest()
        if policy is self.coordinator.policy and who in self.clocks:
            ahead = self.clocks[who] - slowest
            require(ahead <= bound, f"{pending.worker} was decided {ahead} clocks ahead, bound {bound}")
        if who in self.clocks:
            self.clocks[who] += 1

    def _round(self, reduce: Reduce) -> None:
        names = [pending.worker for pending in reduce.pushes]
        require(names == sorted(set(names)), f"a round adds up {names}")
        require(not set(names) & {c.worker for c in reduce.skips}, "a worker counts twice in a round")
        if self._closed is not None:  # added up again, without somebody
            require(
                self._closed.is_added_again(reduce), f"a round of {names} is not what is left of the last one"
            )
            return
        for policy in (self._policy, self.coordinator.policy):
            settings = policy.settings
            if isinstance(settings, SyncSettings) and (settings.reduce == "mean") == reduce.mean:
                break
        else:
            raise Violation("a round was closed as no policy says")
        self._closed = ClosedRound(policy, reduce)
        handed_in = {*names, *(pending.worker for pending in reduce.skips)}
        members, now_s = self.coordinator.sessions.members(), self.loop.now_s
        without = self._awaited.close(settings, handed_in, members, now_s)
        require(not without, f"a round of {names} is closed without {without}")

    def _step(self, step: Step) -> None:
        ticket = step.ticket
        pushes = [resolve.pending for resolve in step.resolves]
        version = self.story[-1].version if self.story else 0
        require(ticket.version == version + 1, f"version {ticket.version} follows {version}")
        require((self.timeline, ticket.version) not in self.chapters, f"version {ticket.version} came again")
        for pending in pushes:
            self._is_current(pending.identity)
        divisor, policy = 1.0, self.coordinator.policy
        if ticket.contributions:
            divisor, policy = self._check_round(step, pushes)
            weights = [float(c.weight) for c in ticket.contributions]
        else:
            require(len(pushes) == 1, "pushes were added up without a word")
            self._check_staleness(step, pushes[0])
            weights = [1.0]
        lr = self.books.lr = self._expected_lr(pushes)
        got = plain_values(ticket.groups[0].values)["lr"]
        require(got == lr, f"version {ticket.version} has lr {got}, the lead's edits make {lr}")
        intents = [self.intents[key_of(pending.identity)] for pending in pushes]
        chapter = Chapter(
            self.timeline,
            ticket.version,
            lr,
            ticket.lr_scale,
            divisor,
            tuple(zip(intents, weights, strict=True)),
            tuple(key_of(pending.identity) for pending in pushes),
        )
        for intent in intents:
            require(
                intent not in self.books.applied, f"intent {intent.worker}:{intent.number} is applied again"
            )
            self.books.applied.add(intent)
        self.story.append(chapter)
        self.chapters[self.timeline, ticket.version] = chapter
        for resolve in step.resolves:
            if resolve.decided is None:
                raise Violation("a step without a verdict")
            signed = resolve.decided.receipt.policy
            require(signed == policy.name, f"{policy.name} has decided, and the receipt says {signed}")
            self._consumed(resolve.pending, "OUTCOME_APPLIED", ticket.version)

    def undone(self, step: Step, arenas: Arenas) -> None:
        """A step has failed before it wrote anything. Its version stays, and has moved nothing."""
        timeline, version = int(step.resolves[0].pending.identity.timeline), step.ticket.version
        if arenas.timeline == timeline:
            require(arenas.version >= version, f"a failed step leaves version {version} to the next one")
        chapter = self.chapters[timeline, version]
        chapter.undone = True
        self.books.applied -= {intent for intent, _ in chapter.intents}
        self.outcomes["failed"] = self.outcomes.get("failed", 0) + 1

    def _is_current(self, identity: Identity) -> None:
        who = f"{identity.worker}'s push of timeline {identity.timeline}, epoch {identity.epoch}"
        require(identity.timeline == self.timeline, f"{who} is let in on timeline {self.timeline}")
        require(identity.epoch == self.epochs[identity.worker], f"{who} is let in, its epoch is over")
        fenced = (identity.timeline, identity.worker, identity.epoch)
        require(fenced not in self.evicted, f"{who} is let in after its eviction")

    def _check_round(self, step: Step, pushes: Sequence[PendingPush]) -> tuple[float, Policy]:
        closed, self._closed = self._closed, None
        if closed is None or closed.changed or closed.pushes != pushes:
            raise Violation("a round was stepped that nobody closed")
        policy = closed.policy
        weights = [pending.header.samples or 1.0 for pending in pushes]
        require(
            [c.weight for c in step.ticket.contributions] == weights, "a weight is not what its worker said"
        )
        divisor = sum(weights) if closed.mean else 1.0
        require(step.ticket.divisor == divisor, f"divided by {step.ticket.divisor} instead of {divisor}")
        since = self._lateness.since(policy)
        if not self._lateness.is_let_in(policy):
            known = {c.worker: self._lateness.known_to(c) for c in pushes}
            require(min(known.values()) >= since, f"pushes on {known} are in a round after version {since}")
        self._lateness.made(policy, step.ticket.version)
        return divisor, policy

    def _check_late(self, pending: PendingPush) -> None:
        settings, since = self.coordinator.policy.settings, self._lateness.since(self.coordinator.policy)
        drops = isinstance(settings, SyncSettings) and settings.late == "drop"
        is_there = any(worker.name == pending.worker for worker in self.coordinator.sessions.members())
        is_late = (drops and self._lateness.known_to(pending) < since) or not is_there
        require(is_late, f"{pending.worker} is said to be late, the last round made version {since}")

    def _check_too_stale(self, stale: int) -> None:
        settings = self.coordinator.policy.settings
        bound = settings.max_staleness if isinstance(settings, AsyncSettings) else None
        require(
            bound is not None and stale > bound, f"a staleness of {stale} is refused, the bound is {bound}"
        )

    def _check_staleness(self, step: Step, pending: PendingPush) -> None:
        settings = self.coordinator.policy.settings
        stale = step.ticket.version - 1 - pending.header.base_version
        scale = 1.0
        if isinstance(settings, AsyncSettings):
            bound = settings.max_staleness
            require(bound is None or stale <= bound, f"a push of staleness {stale} is applied, bound {bound}")
            scale = 1 / (1 + stale) if settings.scale else 1.0
        require(step.ticket.lr_scale == scale, f"lr scaled by {step.ticket.lr_scale} for staleness {stale}")

    def leaves(self, identity: Identity, lr: float) -> None:
        """A worker is about to go with an lr of its own, which counts once if it leads; of an epoch that is over, not."""
        current = identity.epoch == self.epochs.get(identity.worker) and identity.timeline == self.timeline
        quarantined = self.coordinator.sessions.workers[identity.worker].quarantined if current else True
        if identity.worker == self._lead() and not quarantined and not self.books.held:
            self.books.lr = lr

    def _lead(self) -> str | None:
        live = [worker.name for worker in self.coordinator.sessions.live()]
        return min(live, key=lambda name: self.join_order[name], default=None)

    def check_lr(self, lr: float) -> None:
        """The groups say what the lead's edits and an operator's make."""
        require(lr == self.books.lr, f"the lr is {lr}, the lead's edits make {self.books.lr}")

    def _expected_lr(self, pushes: Sequence[PendingPush]) -> float:
        """The lead's edits count, and nobody else's; none while an operator holds the lr."""
        if self.books.held:
            return self.books.lr
        lead = self._lead()
        lr = self.books.lr
        for pending in pushes:
            if pending.worker == lead:
                lr = pending.edits().get(0, {}).get("lr", lr)
        return float(lr)

    # Waiting.

    def _nobody_hangs(self) -> None:
        """What a round holds is decided within the time-out, or else a lease, once enough workers are there."""
        settings, now_s = self.coordinator.policy.settings, self.loop.now_s
        if not self.coordinator.policy.waits:
            return
        members, lease_s = self.coordinator.sessions.members(), self.coordinator.sessions.lease_s
        for worker in members:
            silent_s = now_s - max(self.last_heard_s.get(worker.name, 0.0), self._began_s)
            require(
                silent_s <= lease_s + SLACK_S, f"{worker.name} is waited for, silent for {silent_s:.1f} s"
            )
        if not isinstance(settings, SyncSettings) or len(members) < settings.min_workers:
            self._waits.clear()
            return
        held = {
            key_of(pending.identity)
            for worker in self.coordinator.sessions.workers.values()
            for sequence, pending in worker.undecided.items()
            if sequence == worker.sequence + 1
        }
        if settings is not self._waits_under:  # other settings promise from now on
            self._waits, self._waits_under = {}, settings
        self._waits = {key: self._waits.get(key, now_s) for key in held}
        bound_s = (settings.timeout_s or SLOWEST_S + lease_s) + SLACK_S
        for key, since_s in self._waits.items():
            require(now_s - since_s <= bound_s, f"a push of {key[1]} waits for {now_s - since_s:.1f} s")

    # What workers are told.

    def told(self, identity: Identity, receipt: Any) -> None:
        """A receipt came; the same one each time."""
        if receipt.outcome == Outcome.OUTCOME_SUPERSEDED:
            self.intents[key_of(identity)].fate = "superseded"
            return
        kept = type(receipt)()
        kept.CopyFrom(receipt)
        # known only when the step has been taken, which a snapshot of before does not hold
        for name in ("times", "duplicates", "durable_version"):
            kept.ClearField(name)
        for group in kept.groups:
            group.effective_lr = 0.0
        text = kept.SerializeToString(deterministic=True)
        require(self.receipts.setdefault(key_of(identity), text) == text, "a retry got another receipt")
        intent = self.intents[key_of(identity)]
        chapter = self.chapters.get((identity.timeline, receipt.version))
        applied = receipt.outcome == Outcome.OUTCOME_APPLIED
        there = chapter is not None and not chapter.undone and intent in (i for i, _ in chapter.intents)
        if applied:
            require(there, f"{intent.worker}:{intent.number} is told version {receipt.version}")
        intent.fate = "applied" if applied else "not applied"

    # The end.

    def check_state(self, version: int, parameters: Tensor, sums: Tensor) -> None:
        """The arenas hold what the story makes up to a version, bit for bit; and each intent of it exactly once."""
        story = [chapter for chapter in self.story if chapter.version <= version]
        replayed = self._replay.of(story)
        require(torch.equal(replayed[0], parameters), "the parameters are not what the story makes")
        require(torch.equal(replayed[1], sums), "Adagrad's sum is not what the story makes")
        if not all(c.divisor == 1 and all(weight == 1 for _, weight in c.intents) for c in story):
            return
        times: dict[Intent, int] = dict.fromkeys(self.intents.values(), 0)
        for chapter in story:
            for intent, _ in chapter.intents if not chapter.undone else ():
                times[intent] += 1
        for intent, count in times.items():
            if not intent.poison:
                name = f"{intent.worker}:{intent.number}"
                require(times_applied(sums, intent) == count <= 1, f"{name} is not in the sum {count} times")

    def check_told(self) -> None:
        """Nobody was told that something was not applied which was."""
        for intent in self.books.applied:
            name = f"{intent.worker}:{intent.number}"
            require(intent.fate != "not applied", f"{name} was applied, and denied")
