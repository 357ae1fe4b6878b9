"""What must never happen in several ranks, checked at every step, answer and start against books of its own.

The witness keeps the history: which intents made which version, and what each version holds. Each rank's part is compared with it
at every step, each worker's answer when it comes, and every rank at every start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pushstep.proto.types_pb2 import Identity, Outcome, Receipt, Ticket
from pushstep.server.arenas.arena import Arenas
from pushstep.server.coordinator.decision import Decision, Resolve, Step
from pushstep.server.journal.journal import Level
from pushstep.server.models.model import Model
from tests.simulation.witness import Violation, require

from .model import PARAMETERS, Intent, State, at_first, parts, stepped

if TYPE_CHECKING:
    from .group import Group
    from .process import RankProcess

Key = tuple[int, str, int, int]


def key_of(identity: Identity) -> Key:
    """What a push is known by."""
    return int(identity.timeline), identity.worker, int(identity.epoch), int(identity.sequence)


@dataclass(frozen=True, eq=False)
class Chapter:
    """One version: what made it, and what it holds."""

    timeline: int
    version: int
    intents: tuple[Intent, ...]
    state: State
    # of each parameter
    steps: list[int]


class Witness:
    """Sees everything and forgets nothing."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.intents: dict[Key, Intent] = {}
        # the versions of the state as it is, from the first on
        self.story: list[Chapter] = []
        # whatever was ticketed last under a timeline and a version
        self.history: dict[tuple[int, int], Chapter] = {}
        # what workers were told or shown
        self.shown: set[tuple[int, int]] = set()
        self.applied: dict[Intent, tuple[int, int]] = {}
        self.outcomes: dict[str, int] = {}
        self.is_created = False
        self.timeline = 1
        self._back: dict[int, RankProcess] = {}
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.story, self.timeline = [], 1
        self._first = Chapter(0, 0, (), at_first(), [0] * PARAMETERS)

    # The processes.

    def watch(self, process: RankProcess, model: Model) -> None:
        """A rank has a model, from here on."""
        arenas, held, executor = model.arenas, model.held, model.executor
        step, resolve, apply = arenas.step, held.resolve, executor.apply
        write = process.catalog.snapshotter.write

        def stepped_here(ticket: Ticket, *rest: Any) -> Any:
            done = step(ticket, *rest)
            try:
                self._steps(process.rank, ticket, arenas)
            except Violation as violation:  # raised here, it would only make the step fail
                self.group.world.fail(violation)
            return done

        def resolved(one: Resolve) -> None:
            self._resolved(one)
            resolve(one)

        def applied(decisions: Sequence[Decision]) -> None:
            for decision in decisions:
                if isinstance(decision, Step):
                    self._ticket(decision)
            apply(decisions)

        async def written(*arguments: Any, **options: Any) -> Any:
            self._manifest(arguments[2].content.timeline, arguments[2].content.version)
            return await write(*arguments, **options)

        arenas.step = stepped_here
        if process.rank == 0:
            held.resolve, executor.apply = resolved, applied
            process.catalog.snapshotter.write = written

    # Steps.

    @property
    def newest(self) -> Chapter:
        """The last version that was ticketed."""
        return self.story[-1] if self.story else self._first

    def _ticket(self, step: Step) -> None:
        ticket, before = step.ticket, self.newest
        version = int(ticket.version)
        require(version == before.version + 1, f"version {version} follows version {before.version}")
        identities = [one.identity for one in ticket.contributions] or [ticket.identity]
        intents = tuple(self.intents[key_of(identity)] for identity in identities)
        for intent in intents:
            once = not any(intent in chapter.intents for chapter in self.story)
            require(once, f"intent {intent} is applied again")
        state, steps = stepped(before.state, before.steps, intents)
        timeline = int(identities[0].timeline)
        require(timeline == self.timeline, f"version {version} is stepped on timeline {timeline}")
        is_new = (timeline, version) not in self.shown
        require(is_new, f"version {version} of timeline {timeline} was shown to somebody, and is made again")
        chapter = Chapter(timeline, version, intents, state, steps)
        self.story.append(chapter)
        self.history[timeline, version] = chapter

    def _steps(self, rank: int, ticket: Ticket, arenas: Arenas) -> None:
        """A rank has taken a step: its part of the version is what the history has."""
        version = int(ticket.version)
        require(arenas.version == version, f"rank {rank} is at version {arenas.version} behind {version}")
        chapter = self.history.get((int(arenas.timeline), version))
        require(chapter is not None, f"rank {rank} steps version {version}, which nobody has ticketed")
        if chapter is not None:
            self._is_part(rank, arenas, chapter, "after its step")

    def _is_part(self, rank: int, arenas: Arenas, chapter: Chapter, when: str) -> None:
        at = f"rank {rank}'s part of version {chapter.version} {when}"
        for piece, slot in zip(parts(self.group.world_size)[rank].pieces, arenas.layout.slots, strict=True):
            for state, wanted in zip(("", "sum"), chapter.state, strict=True):
                same = torch.equal(arenas.view(slot, state).reshape(-1), wanted[piece.whole])
                require(same, f"{at} is not what the pushes make: {state or 'values'} of {slot.name}")

    # Answers.

    def comes(self, identity: Identity, intent: Intent) -> None:
        """A worker is about to push."""
        require(self.intents.setdefault(key_of(identity), intent) is intent, "two pushes have one identity")

    def _resolved(self, resolve: Resolve) -> None:
        """A push is about to be answered: what is applied is applied in every rank, and as safe as its level says."""
        receipt = None if resolve.decided is None else resolve.decided.receipt
        name = "dropped" if receipt is None else Outcome.Name(receipt.outcome).removeprefix("OUTCOME_")
        self.outcomes[name] = self.outcomes.get(name, 0) + 1
        if receipt is None or receipt.outcome != Outcome.OUTCOME_APPLIED:
            return
        for process in self.group.processes:
            model = None if process is None else process.model
            if model is None:  # it has died: rank 0 has not heard of it yet
                continue
            told = f"version {receipt.version} is told before rank {process.rank}"
            require(model.version >= receipt.version, f"{told} has its ticket")
            require(model.arenas.version >= receipt.version, f"{told} has taken its step")
            journal = model.recorder.journal
            if journal is not None and journal.level is Level.DURABLE:
                require(journal.note_durable() > 0, f"{told} has anything on its disk")
                require(journal.durable_version >= receipt.version, f"{told} has it on its disk")

    def told(self, identity: Identity, receipt: Receipt) -> None:
        """A worker has got a receipt."""
        intent = self.intents[key_of(identity)]
        if receipt.outcome != Outcome.OUTCOME_APPLIED:
            return
        at = int(receipt.identity.timeline), int(receipt.version)
        chapter = self.history.get(at)
        there = chapter is not None and intent in chapter.intents
        require(there, f"intent {intent} is told version {receipt.version}, which it has not made")
        self.shown.add(at)
        self.applied[intent] = at

    def answered(self, timeline: int, version: int, values: Mapping[int, Tensor]) -> None:
        """A worker has got all parameters of a version."""
        wanted = self._first if not version else self.history.get((timeline, version))
        if wanted is None:  # of an earlier timeline: the history of a later one has it
            wanted = next((one for one in reversed(self.story) if one.version == version), None)
        require(
            wanted is not None, f"version {version} of timeline {timeline} is answered, which nobody made"
        )
        require(len(values) == PARAMETERS, f"an answer has {len(values)} parameters of {PARAMETERS}")
        if wanted is None:
            return
        self.shown.add((timeline, version))
        for index, found in values.items():
            same = torch.equal(found, wanted.state[0][index])
            require(same, f"an answer mixes versions: p{index} is not that of version {version}")

    # Snapshots.

    def _manifest(self, timeline: int, version: int) -> None:
        """Rank 0 is about to write its snapshot: those of all other ranks are on their disks."""
        for rank in range(1, self.group.world_size):
            found = self.group.snapshots(rank)
            there = any(name.startswith(f"t{timeline}-v{version}-") for name in found)
            require(there, f"rank 0 writes its snapshot of version {version} before rank {rank}'s files")

    # Starts.

    def starts(self) -> None:
        """All ranks are started."""
        self._back = {}

    def came_back(self, process: RankProcess) -> None:
        """A rank has brought back what was on its disk. Once all have: they are where they must be."""
        self._back[process.rank] = process
        if len(self._back) < self.group.world_size:
            return
        models = {rank: one.model for rank, one in self._back.items()}
        if all(model is None for model in models.values()):
            refused = [one.catalog.not_loaded.get("m") for one in self._back.values()]
            problem = next((error for error in refused if error is not None), None)
            require(problem is None, f"the model does not come back: {problem}")
            require(not self.is_created, "the model is gone")
            self._begin_anew()
            return
        at = {}
        for rank, model in models.items():
            require(model is not None, f"rank {rank} has not brought its part back")
            if model is not None:
                at[rank] = model.timeline, model.version
        require(len(set(at.values())) == 1, f"the ranks come back at different versions: {at}")
        timeline, version = at[0]
        require(timeline >= self.timeline, f"timeline {timeline} comes back behind {self.timeline}")
        lost = [chapter for chapter in self.story if chapter.version > version]
        told = [chapter for chapter in lost if (chapter.timeline, chapter.version) in self.shown]
        if told:
            what = f"version {told[0].version} was told to somebody and is gone: all come back at {version}"
            require(self.group.level != "durable", what)
            require(timeline > self.timeline, f"{what}, on the same timeline")
        self.story = [chapter for chapter in self.story if chapter.version <= version]
        require(self.newest.version == version, f"the ranks come back at {version}, which nobody made")
        self.timeline = timeline
        for rank, model in models.items():
            if model is not None:
                self._is_part(rank, model.arenas, self.newest, "after the start")

    # The end.

    def check(self) -> None:
        """All ranks are at the newest version, which holds each push that was acknowledged, and nothing is left over."""
        for process in self.group.processes:
            model = None if process is None else process.model
            if process is None or model is None:
                raise Violation("a rank is not there")
            require(model.arenas.version == self.newest.version, f"rank {process.rank} is behind")
            self._is_part(process.rank, model.arenas, self.newest, "at the end")
            used_bytes = process.catalog.staging.used_bytes
            require(used_bytes == 0, f"rank {process.rank} has {used_bytes} bytes set aside")
            if process.rank:
                held = process.role._other.followers["m"]._held
                require(not held, f"rank {process.rank} still holds {len(held)} parts")
            else:
                arrivals = model.shard.leader._arrivals
                require(not arrivals, f"rank 0 still waits for {len(arrivals)} pushes")
        held_now = {intent for chapter in self.story for intent in chapter.intents}
        for intent, (timeline, version) in self.applied.items():
            if self.group.level == "durable" or timeline == self.timeline:
                require(intent in held_now, f"{intent} was told version {version}, and is not in the state")
