"""Replays a journal over a model that was loaded from a snapshot: the same kernels over the same bytes, nothing decided.

Every record holds what was decided: the ticket of a step with the gradients as they were received, the outcomes that
workers were given, and what else of the manifest has changed. So the model is afterwards, to the bit, what it was.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from pushstep.proto.errors import JournalDamaged, OutOfMemory, PushstepError
from pushstep.proto.journal_pb2 import JournalRecord
from pushstep.proto.types_pb2 import Outcome, ServerTimes
from pushstep.proto.wire.hyperparameters import values_of

from ..arenas.arenas_copy import ArenasCopy
from ..arenas.extras import Extras
from ..captures.capture import spans_of
from ..coordinator.commits import Revisions
from ..coordinator.gate import Gate
from ..coordinator.groups import ParamGroups
from ..coordinator.hooks.chain import HookChain
from ..coordinator.policies import catalogue as policies
from ..coordinator.receipts import complete
from ..coordinator.worker import Decided, count_failed
from ..journal.chain import JournalChain
from ..journal.durability import read_durability
from ..journal.file import Record
from ..journal.records import PayloadReader, decided_of, error_of, on_device
from ..staging import reduction
from ..storage.model_folder import ModelFolder
from ..storage.saved_state import SavedState, saved_state
from ..storage.tensor_file import tensors_in
from .model import Model

log = logging.getLogger("pushstep.replay")
PROGRESS_EVERY_S: Final = 5.0


class Replay:
    """Brings one model forward by its journal. It blocks, and nothing else may touch the model meanwhile."""

    def __init__(
        self,
        model: Model,
        chain: JournalChain,
        after: int,
        made_of: Callable[[int, int], bool],
        until: int | None = None,
        reached: Callable[[int], None] | None = None,
    ) -> None:
        """A replay of the records behind number `after`.

        made_of: whether the model descends from a (timeline, version); what a restore has undone ends the replay.
        until: the last version to replay; None for all. `reached` hears each version.
        """
        self._model = model
        self._chain = chain
        self._made_of = made_of
        self._until = until
        self._after = after
        self._reached = reached
        # the number of the last record that was replayed
        self.last = after
        # True if the replay came to the journal's end
        self.is_complete = True

    def run(self) -> None:
        """Replay. JournalDamaged, also for a record that does not fit the model; OutOfMemory."""
        failures = self._chain.failures(self._after)
        begun_s = said_s = time.monotonic()
        for record in self._chain.records(self._after):
            message = record.message
            at = int(message.timeline), int(message.version)
            if not self._made_of(*at) or (self._until is not None and at[1] > self._until):
                self.is_complete = False
                break
            try:
                self._apply(record, failed=at in failures)
            except OutOfMemory:  # the record is not at fault
                raise
            except (ValueError, KeyError, IndexError, TypeError, PushstepError) as error:
                raise JournalDamaged(
                    model=self._model.name, file="", record=record.number, problem=f"it does not fit: {error}"
                ) from error
            self.last = record.number
            if self._reached is not None:
                self._reached(self._model.version)
            if time.monotonic() - said_s >= PROGRESS_EVERY_S:
                said_s = time.monotonic()
                log.info(
                    "model %s: replayed up to version %d",
                    self._model.name,
                    self._model.version,
                    extra={"model": self._model.name},
                )
        log.info(
            "model %s: replayed %d records of its journal, to version %d, in %.1f s",
            self._model.name,
            self.last - self._after,
            self._model.version,
            time.monotonic() - begun_s,
            extra={"model": self._model.name},
        )

    def _apply(self, record: Record, *, failed: bool) -> None:
        message, model = record.message, self._model
        outcomes = [decided_of(outcome) for outcome in message.outcomes]
        payload = PayloadReader(record.payload)
        match message.WhichOneof("change"):
            case "step":
                self._step(message, payload, outcomes, failed=failed)
            case "failure":
                self._fail(message)
            case "values" if failed:
                model.arenas.version = int(message.version)
            case "values":
                self._upload(message, payload)
            case "extras":
                held = {} if message.extras.all else model.extras
                file = payload.take_bytes(int(message.extras.file_bytes))
                tensors = {name: tensor.clone() for name, tensor in tensors_in(file).items()}
                model.extras = Extras({**held, **tensors}, model.extras)
        for outcome, decided in zip(message.outcomes, outcomes, strict=True):
            worker = model.sessions.workers[decided.receipt.identity.worker]
            if model.sessions.stored(worker, decided.receipt.identity) is not None:
                continue  # the worker's row had it
            model.sessions.consume(worker, decided)
            state = outcome.worker_state if outcome.HasField("worker_state") else None
            model.sessions.carry(worker, {}, state)
            worker.refused_in_row = int(outcome.refused_in_row)
        if message.changed:
            self._change(json.loads(message.changed))
        model.commits.version = int(message.version)

    def _step(
        self, message: JournalRecord, payload: PayloadReader, outcomes: list[Decided], *, failed: bool
    ) -> None:
        model, ticket = self._model, message.step.ticket
        device = model.arenas.device
        pushes = [on_device(payload.push(g, model.layout), device) for g in message.step.gradients]
        push = pushes[0]
        if ticket.contributions:
            weights = [contribution.weight for contribution in ticket.contributions]
            push = reduction.add_up(pushes, weights, ticket.divisor)
        model.groups.note_rows(push.parts)
        # a rank that only executes tickets gives no outcomes
        values = outcomes[0].receipt.groups if outcomes else ticket.groups
        for group, now in zip(model.groups.list, values, strict=True):
            group.values = values_of(now)
        if failed:
            model.arenas.version = int(ticket.version)
            return
        with model.arenas.device_stream.over([push]):
            _, clip_factor = model.arenas.step(ticket, push.parts)
        lrs = model.arenas.applied_lrs(ticket)
        for decided in outcomes:
            complete(decided, lrs, ServerTimes(), None, clip_factor)

    def _fail(self, message: JournalRecord) -> None:
        """The step of a version failed: its pushes were answered with an error after all."""
        for worker in self._model.sessions.workers.values():
            for decided in worker.decided_pushes:
                receipt = decided.receipt
                if receipt.version == message.version and receipt.outcome == Outcome.OUTCOME_APPLIED:
                    complete(decided, {}, ServerTimes(), error_of(message.failure))
                    count_failed(self._model.sessions.workers, decided)

    def _upload(self, message: JournalRecord, payload: PayloadReader) -> None:
        model, arenas, version = self._model, self._model.arenas, int(message.version)
        fresh = [model.layout.slots[index] for index in message.values.fresh]
        with arenas.writing(spans_of(message.values.segments, fresh)):
            arenas.version = version
            for segment, values in payload.values(message.values.segments):
                flat = arenas.flat(segment.arena, segment.state)
                flat[segment.start : segment.stop].copy_(values)
                for slot in model.layout.slots_of(segment):
                    arenas.mark_changed(slot, version)
            arenas.begin_anew(fresh, [group.values for group in model.groups.list])

    def _change(self, changed: dict[str, Any]) -> None:
        """Take over the entries of the manifest that a record brings."""
        model = self._model
        if "groups" in changed or "hooks" in changed:
            groups = ParamGroups.parse(changed.get("groups", model.groups.dump()))
            hooks = HookChain.parsed(changed.get("hooks", model.hooks.dump()), groups, model.name)
            model.groups.replace(groups)
            model.hooks.become(hooks)
            arenas = model.arenas
            arenas.averages.keep(hooks.averages(), arenas.layout, arenas.parameters)
        if "gate" in changed:
            model.coordinator.gate = Gate.parsed(changed["gate"])
        if "policy" in changed:
            model.coordinator.switch(policies.read(changed["policy"]), model.clock())
        if "durability" in changed:
            model.durability = read_durability(changed["durability"], model.durability)
        model.edit = int(changed.get("edit", model.edit))
        if "revisions" in changed:
            model.revisions = Revisions(changed["revisions"])
        model.sessions.forgotten_epoch = int(changed.get("forgotten_epoch", model.sessions.forgotten_epoch))
        for name, row in changed.get("workers", {}).items():
            model.sessions.put(name, row, model.clock())


@dataclass(frozen=True, slots=True)
class Held:
    """What a model held at a version: everything but its arenas, as JSON, with the snapshot's id, and the arenas."""

    facts: dict[str, Any]
    copy: ArenasCopy
    # the last journal record that it follows, and how many were replayed over the snapshot, in what time
    last: int
    records: int
    seconds: float


def held_at(
    folder: ModelFolder,
    uid: bytes,
    made_of: Callable[[int, int], bool],
    version: int | None,
    scratch: Callable[[SavedState], Model],
    last: int | None = None,
    reached: Callable[[int], None] | None = None,
) -> Held | None:
    """What a model held at a version, or as near before it as snapshots and journal reach; None: at their end.

    None if no snapshot is so old. `made_of`: whether the model descends from a (timeline, version). `scratch` makes a model
    of a saved state that no other has. last: of a journal that is being written to, the last record to read. `reached`
    hears each version that is replayed. It blocks.
    """

    def is_wanted(timeline: int, at: int) -> bool:
        return (version is None or at <= version) and made_of(timeline, at)

    found = folder.snapshots.newest(is_wanted)
    if found is None:
        return None
    manifest, copy = found
    state = saved_state(manifest, copy, folder.name)
    chain = JournalChain(folder.journal, uid, last=last)
    if state.copy.version == version or not chain.continues(state.journal):
        return Held(manifest, copy, state.journal, 0, 0.0)
    model = scratch(state)
    replay = Replay(model, chain, state.journal, made_of, until=version, reached=reached)
    begun_s = time.monotonic()
    replay.run()
    seconds = time.monotonic() - begun_s
    facts, copy = model.as_it_is()
    return Held({**facts, "id": state.snapshot}, copy, replay.last, replay.last - state.journal, seconds)
