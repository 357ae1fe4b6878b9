"""A worker that pushes in parts, by the rules of client/shards: all parts at once, one identity, rank 0's answer counts.

One process of one worker. It sends what is not answered again, joins again when its session has ended, and settles what is
in doubt from the receipts that the join brings.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import (
    AlreadyJoined,
    Fenced,
    LeaseExpired,
    ModelExists,
    NoCreationTicket,
    NotHeld,
    PushPending,
    PushstepError,
    Superseded,
    Unavailable,
    UnknownWorker,
    VersionGone,
)
from pushstep.proto.types_pb2 import Identity, Outcome
from pushstep.proto.wire.frames import Assembly, Piece, pack, unpack
from pushstep.proto.wire.layout import Layout
from tests.simulation.witness import Violation

from .group import Group
from .links import Call, Gone, Inbox, Winds
from .model import WHOLE, Intent, part_body, parts
from .process import LEASE_S, RankProcess
from .world import ProcessLoop, World

ATTEMPT_S = 2.5
HOLD_S = 1.0
VERDICT_S = 2.0
RETRY_FOR_S = 60.0
# A pull of exact versions is begun so often.
PULLS = 20


@dataclass
class Habits:
    """How a worker works."""

    think_s: float = 0.3
    pulls: float = 0.7
    # of a step: to be followed by a pull of its own
    looks: float = 0.1


class Out(Exception):
    """Its session is over, and it may not go on."""


class Worker:
    """From its start to its end."""

    def __init__(
        self,
        name: str,
        world: World,
        loop: ProcessLoop,
        winds: Winds,
        group: Group,
        chance: random.Random,
        habits: Habits,
        draw: Callable[[str], Intent | None],
    ) -> None:
        self.name = name
        self.group = group
        self.habits = habits
        self.identity: Identity | None = None
        self.version = 0
        self.values: dict[int, Tensor] = {}
        self.done = 0
        self.is_idle = False
        self._is_over = False
        self._world, self._loop, self._winds, self._chance = world, loop, winds, chance
        self._draw = draw
        self._map = 0
        self._open: list[Call] = []
        self._tasks = [loop.create_task(self._live()), loop.create_task(self._beat())]

    def crash(self) -> None:
        """End without a word; what it has open breaks."""
        self._is_over = True
        for task in self._tasks:
            task.cancel()
        for call in self._open:
            call.cancel()

    @property
    def is_alive(self) -> bool:
        """Whether it goes on."""
        return not self._is_over and not self._tasks[0].done()

    async def _live(self) -> None:
        try:
            await self._join()
            while True:
                self.is_idle = True
                await asyncio.sleep(self._chance.uniform(0.1, 1.0) * self.habits.think_s)
                intent = self._draw(self.name)
                if intent is not None:
                    self.is_idle = False
                    await self._step(intent)
                    self.done += 1
                    if self._chance.random() < self.habits.looks and self.identity is not None:
                        await self._pull(int(self.identity.timeline))
        except (Out, Fenced):
            return
        except PushstepError as error:
            self._world.fail(Violation(f"{self.name} is told {error.code}: {error.message}"))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            identity = self.identity
            if identity is None:
                continue
            request = pb.HeartbeatRequest(model="m", identity=identity)
            try:
                async with asyncio.timeout(ATTEMPT_S):
                    await self._asked(0, partial(_beaten, request))
            except (PushstepError, Gone, TimeoutError):
                pass  # its next push finds out

    # Calls.

    def _called(self, rank: int, begin: Callable[[RankProcess, Inbox], Any]) -> Call:
        call = Call(self._world, self._winds, self._loop, self.group.processes[rank], begin)
        self._open.append(call)
        call.answer.add_done_callback(lambda _: self._open.remove(call))
        return call

    async def _asked(self, rank: int, begin: Callable[[RankProcess, Inbox], Any]) -> Any:
        call = self._called(rank, begin)
        try:
            return await call.answer
        finally:
            call.cancel()

    async def _again(self, wait_s: float) -> float:
        await asyncio.sleep(wait_s * self._chance.uniform(0.5, 1.0))
        return min(2 * wait_s, 1.0)

    # Joining.

    async def _join(self) -> pb.Membership:
        attempt, wait_s = self._chance.getrandbits(63) + 1, 0.05
        old = self.identity
        request = pb.JoinRequest(model="m", worker=self.name, attempt=attempt, manifest=WHOLE.manifest)
        if old is not None:
            request.model_uid, request.epoch = old.model_uid, old.epoch
            request.timeline, request.version = old.timeline, self.version
        while True:
            try:
                async with asyncio.timeout(ATTEMPT_S):
                    answer = await self._asked(0, lambda process, _: process.door.join(request))
                member = answer.member if answer.HasField("member") else await self._create(answer.create)
                break
            except (AlreadyJoined, Unavailable) as error:
                wait_s = await self._again(max(error.retry_after_s or 0.0, wait_s))
            except (Gone, TimeoutError, NoCreationTicket, ModelExists):
                wait_s = await self._again(wait_s)
        self.group.witness.is_created = True
        self.identity, self._map = member.identity, int(member.shards.version)
        self.version, self.values = 0, {}
        return member

    async def _create(self, ticket: pb.CreationTicket) -> pb.Membership:
        """Upload the first values, to each rank its part. Gone if one has no answer for it."""
        calls = []
        for part in parts(self.group.world_size):
            header = pb.UploadHeader(
                model="m",
                kind=pb.UPLOAD_KIND_CREATE,
                ticket=ticket.ticket,
                manifest=part.layout.manifest,
                map_version=ticket.shards.version,
            )
            slots = part.layout.slots
            segments = part.layout.dense_segments(slots, of_push=True)
            header.segments.extend(segment for segment, _ in segments)
            zeros = [[Piece(torch.zeros(slot.shape), slot.dtype) for slot in held] for _, held in segments]
            call = self._called(part.rank, lambda process, inbox: process.door.upload(inbox))
            call.send(pb.UploadRequest(header=header).SerializeToString(), *pack(zeros))
            call.finish()
            calls.append(call)
        try:
            async with asyncio.timeout(2 * ATTEMPT_S):
                answers = await asyncio.gather(*(call.answer for call in calls))
        finally:
            for call in calls:
                call.cancel()
        return answers[0].member

    # Pushing.

    async def _step(self, intent: Intent) -> None:
        """Push until there is an outcome, under a new identity if the session has ended meanwhile."""
        while not await self._pushed(intent):
            pass

    async def _pushed(self, intent: Intent) -> bool:
        """Whether there is an outcome. If not, what the push would have changed is not changed."""
        if self.identity is None:
            raise Out
        identity = Identity()
        identity.CopyFrom(self.identity)
        identity.sequence += 1
        intent.identities.append(identity)
        self.group.witness.comes(identity, intent)
        pulls = not intent.skip and self._chance.random() < self.habits.pulls
        held: dict[int, int] = {}
        until_s, wait_s = self._world.now_s + RETRY_FOR_S, 0.05
        while True:
            try:
                receipt = await self._attempt(intent, identity, pulls, held)
            except PushPending as error:
                if not held:
                    held = {rank: self._body(intent, rank).digest for rank in range(self.group.world_size)}
                    held[0] = int(error.fields["digest"])
                continue
            except NotHeld:
                held = {}
                continue
            except (Superseded, LeaseExpired, UnknownWorker):
                return self._settled(identity, await self._join())
            except Unavailable as error:
                wait_s = await self._again(max(error.retry_after_s or 0.0, wait_s))
            except (Gone, TimeoutError):
                wait_s = await self._again(wait_s)
            else:
                self.identity.sequence = identity.sequence
                return bool(receipt.outcome != Outcome.OUTCOME_SUPERSEDED)
            if self._world.now_s > until_s:  # a new epoch makes sure that it is not applied from here on
                return self._settled(identity, await self._join())

    def _settled(self, old: Identity, member: pb.Membership) -> bool:
        for receipt in member.receipts:
            if receipt.identity == old:
                self.group.witness.told(old, receipt)
                return bool(receipt.outcome != Outcome.OUTCOME_SUPERSEDED)
        return False

    def _body(self, intent: Intent, rank: int) -> Any:
        touches = () if intent.skip else intent.touches
        return part_body(self.group.world_size, rank, intent.element, intent.value, touches)

    async def _attempt(self, intent: Intent, identity: Identity, pulls: bool, held: dict[int, int]) -> Any:
        count = self.group.world_size
        others = [
            rank
            for rank in range(1, count)
            if not intent.skip and (pulls or self._body(intent, rank).segments)
        ]
        have = self.version if pulls and self.values and self._chance.random() < 0.5 else None
        calls: dict[int, Call] = {}
        order = [0, *others]
        self._chance.shuffle(order)
        digests = [pb.PartDigest(rank=rank, digest=self._body(intent, rank).digest) for rank in others]
        for rank in order:
            header = pb.PushHeader(
                model="m",
                identity=identity,
                base_version=self.version,
                manifest_hash=parts(count)[rank].layout.manifest_hash,
                segments=self._body(intent, rank).segments,
                skip=intent.skip,
                hold_s=HOLD_S,
                map_version=self._map,
                held_digest=held.get(rank, 0),
            )
            if pulls:
                header.pull.SetInParent()
                if have is not None:
                    header.pull.have_version = have
            calls[rank] = self._sent(rank, header, intent, pulls, [] if rank else digests)
        try:
            return await self._outcome(identity, calls, pulls, have)
        finally:
            for call in calls.values():
                call.cancel()

    def _sent(
        self, rank: int, header: pb.PushHeader, intent: Intent, pulls: bool, digests: list[pb.PartDigest]
    ) -> Call:
        async def begin(process: RankProcess, inbox: Inbox) -> Any:
            if not pulls:
                return await process.door.push(inbox)
            return [message async for message in process.door.exchange(inbox)]

        call = self._called(rank, begin)
        call.send(pb.PushRequest(header=header).SerializeToString())
        if not header.held_digest:
            body = self._body(intent, rank)
            commit = pb.PushCommit(digest=body.digest, parts=digests)
            call.send(*body.frames, pb.PushRequest(commit=commit).SerializeToString())
        return call

    async def _outcome(
        self, identity: Identity, calls: dict[int, Call], pulls: bool, have: int | None
    ) -> Any:
        """Rank 0's answer; the others' where it has none. Gone, TimeoutError, or what the push was refused with."""
        first = calls[0].answer
        others = {rank: call.answer for rank, call in calls.items() if rank}
        deadline_s = self._world.now_s + ATTEMPT_S
        refused: PushstepError | None = None
        waiting = {first, *others.values()}
        while not first.done():
            left_s = deadline_s - self._world.now_s
            if left_s <= 0:
                # the digest of a part that waits in another rank is not that of the whole push
                raise TimeoutError if isinstance(refused, PushPending) else refused or TimeoutError
            done, waiting = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            for one in done - {first}:
                problem = one.exception()
                if isinstance(problem, PushstepError) and refused is None:
                    refused, deadline_s = problem, min(deadline_s, self._world.now_s + VERDICT_S)
                elif isinstance(problem, Gone) and not first.done():
                    raise problem
        answer = first.result()
        if not pulls:
            self.group.witness.told(identity, answer.receipt)
            return answer.receipt
        header, values = read(answer, parts(self.group.world_size)[0].layout, self._held(0, have))
        self.group.witness.told(identity, header.receipt)
        await self._parts(header, values, others, have)
        return header.receipt

    def _held(self, rank: int, have: int | None) -> dict[int, Tensor]:
        """By its index in the part: what the worker has of a rank's parameters, if it has said so."""
        if have is None:
            return {}
        pieces = parts(self.group.world_size)[rank].pieces
        return {piece.index: self.values[piece.whole] for piece in pieces}

    # Parameters.

    async def _parts(
        self,
        header: pb.PullHeader,
        first: dict[int, Tensor],
        others: dict[int, asyncio.Future[Any]],
        have: int | None,
    ) -> None:
        """Put an exchange's answers together, or pull what they lack."""
        layouts = parts(self.group.world_size)
        here: dict[int, dict[int, Tensor]] = {0: first}
        at = header.timeline, header.version
        try:
            async with asyncio.timeout(ATTEMPT_S):
                if others:
                    await asyncio.wait(others.values())
            for rank, answer in others.items():
                if answer.exception() is None:
                    found, values = read(answer.result(), layouts[rank].layout, self._held(rank, have))
                    if (found.timeline, found.version) == at and not found.apart:
                        here[rank] = values
            if header.apart:
                raise VersionGone(version=header.version, model="m", rank=0)
            await self._lacking(header, here, have)
        except (VersionGone, Gone, TimeoutError, PushstepError):
            await self._pull(int(header.timeline))

    async def _lacking(
        self, header: pb.PullHeader, here: dict[int, dict[int, Tensor]], have: int | None
    ) -> None:
        layouts = parts(self.group.world_size)
        for rank in range(self.group.world_size):
            if rank in here:
                continue
            request = pb.PullRequest(
                model="m", manifest_hash=layouts[rank].layout.manifest_hash, map_version=self._map
            )
            request.timeline = header.timeline
            request.options.version = header.version
            if have is not None:
                request.options.have_version = have
            found, values = await self._pulled(rank, request, have)
            at = found.timeline, found.version
            if at != (header.timeline, header.version):
                raise VersionGone(version=header.version, model="m", rank=rank)
            here[rank] = values
        values = {
            piece.whole: here[rank][piece.index]
            for rank, part in enumerate(layouts)
            for piece in part.pieces
            if piece.index in here[rank]
        }
        self.group.witness.answered(int(header.timeline), int(header.version), values)
        self.version, self.values = int(header.version), values

    async def _pulled(
        self, rank: int, request: pb.PullRequest, have: int | None
    ) -> tuple[pb.PullHeader, dict[int, Tensor]]:
        async def begin(process: RankProcess, _: Inbox) -> Any:
            return [message async for message in process.door.pull(request)]

        async with asyncio.timeout(2 * ATTEMPT_S):
            answer = await self._asked(rank, begin)
        return read(answer, parts(self.group.world_size)[rank].layout, self._held(rank, have))

    async def _pull(self, timeline: int) -> None:
        """All parts of the newest version. It may be given up: the next step pulls again."""
        for _ in range(PULLS):
            have = self.version if self.values and self._chance.random() < 0.5 else None
            request = pb.PullRequest(model="m", timeline=timeline, map_version=self._map)
            request.manifest_hash = parts(self.group.world_size)[0].layout.manifest_hash
            if have is not None:
                request.options.have_version = have
            try:
                header, values = await self._pulled(0, request, have)
                await self._lacking(header, {0: values}, have)
            except VersionGone:
                continue
            except (PushstepError, Gone, TimeoutError):
                return
            return


async def _beaten(request: pb.HeartbeatRequest, process: RankProcess, _: Inbox) -> pb.HeartbeatResponse:
    return await process.door.heartbeat(request)


def read(
    messages: list[bytes], layout: Layout, held: dict[int, Tensor]
) -> tuple[pb.PullHeader, dict[int, Tensor]]:
    """An answer's header and its parameters, by their index in the part; `held` where they are unchanged."""
    fields, chunk = unpack(messages[0], pb.PullResponse)
    if fields is None:
        raise ValueError("an answer without a header")
    header = fields.header
    if header.unchanged:
        return header, dict(held)
    spans = [(segment, layout.slots_of(segment)) for segment in header.segments]
    body = Assembly([4 * (segment.stop - segment.start) for segment, _ in spans])
    for message in messages[1:] if chunk is None else [b"", *messages[1:]]:
        found = chunk if not message else unpack(message, pb.PullResponse)[1]
        if found is not None:
            body.place(found)
    body.finish()
    values: dict[int, Tensor] = {}
    for index, (_, slots) in enumerate(spans):
        flat = body.part(index, torch.float32)
        for slot, piece in zip(
            slots, flat.split_with_sizes([slot.stop - slot.start for slot in slots]), strict=True
        ):
            values[slot.index] = piece
    return header, values
