"""The channels of a session whose model lies in several ranks: one to rank 0, and one to each other rank of the map.

Rank 0 decides, and says where the parts are: in the membership, the creation ticket, or the answer to a reader's first
pull. As long as it has named no map, this is a channel to a server alone, and does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import ManifestChanged, MapChanged, RanksDiffer, VersionGone
from pushstep.proto.types_pb2 import Identity
from pushstep.proto.wire.layout import Layout
from pushstep.proto.wire.shards import cut

from ..transport.channel import Transport
from ..transport.retry import answered
from ..transport.security import Security, is_unix
from ..transport.shield import shield
from ..transport.streams import Body, Exchange, Pulled
from . import uploads
from .bodies import Cutting
from .joined import Joined, steps_of
from .lanes import Lanes, failure_of
from .parts import Part
from .rows import RowCalls, RowsCut

R = TypeVar("R", pb.PullRequest, pb.PullStateRequest)
# How often a pull begins anew because a rank has gone on, or knows another map.
TRIES: Final = 100


class ShardedTransport(Transport):
    """Owns the channels to the ranks. `shards` is the newest map; None: the server holds its models whole."""

    def __init__(self, address: str, timeout_s: float, security: Security | None = None) -> None:
        super().__init__(address, timeout_s, security)
        self.shards: pb.ShardMap | None = None
        self.lanes = Lanes()
        self._others: dict[int, Transport] = {}
        self._cut: tuple[Layout | None, Sequence[Part], Cutting | None] = (None, (), None)
        # the whole layout, of the last answer that brought it
        self._brought: list[Layout] = []

    # The map.

    def take(self, shards: pb.ShardMap | None) -> None:
        """Use this map from now on."""
        if shards is not None and self.shards is not None and shards.version == self.shards.version:
            return
        known = {rank: transport.address for rank, transport in self._others.items()}
        wanted = (
            {shard.rank: self._address(shard) for shard in shards.shards[1:]} if shards is not None else {}
        )
        for rank, address in known.items():
            if wanted.get(rank) != address:
                self._others.pop(rank).close()
        for rank, address in wanted.items():
            if rank not in self._others:
                self._others[rank] = Transport(address, self.timeout_s, self.security.at(address), self.wait)
        self.shards, self._cut = shards, (None, (), None)

    def _address(self, shard: pb.Shard) -> str:
        """Where a rank is reached: over its Unix socket if rank 0 is."""
        return f"unix:{shard.unix_path}" if is_unix(self.address) and shard.unix_path else shard.address

    def parts(self, layout: Layout) -> Sequence[Part]:
        """The parts of a model, by the map. RanksDiffer if the ranks were cut in another way."""
        return self._cut_of(layout)[1]

    def cut(self, layout: Layout, body: Body) -> list[Body]:
        """A body's part for each of `parts`."""
        cutting = self._cut_of(layout)[2]
        return [] if cutting is None else cutting.of(body)

    def _cut_of(self, layout: Layout) -> tuple[Layout | None, Sequence[Part], Cutting | None]:
        known = self._cut[0]
        if known is None or (known is not layout and known.manifest_hash != layout.manifest_hash):
            self._cut = self._anew(layout)
        return self._cut

    def _anew(self, layout: Layout) -> tuple[Layout | None, Sequence[Part], Cutting | None]:
        if self.shards is not None:
            found = {
                each.rank: Part(each, layout) for each in cut(layout, self.shards.world) if each is not None
            }
            hashes = {shard.rank: shard.manifest_hash for shard in self.shards.shards}
            for rank in sorted(hashes.keys() | found.keys()):
                if rank not in found or hashes.get(rank) != found[rank].layout.manifest_hash:
                    raise RanksDiffer(
                        rank=rank, problem="it has cut the model in another way than this worker"
                    )
            parts = list(found.values())
            return layout, parts, Cutting(layout, parts)
        return None, (), None

    def of(self, part: Part) -> Transport | None:
        """The channel to a part's rank; None: this one."""
        return self._others.get(part.rank)

    def check_map(self, model: str, identity: Identity) -> bool:
        """Ask rank 0 whether the map is still in force."""
        request = pb.HeartbeatRequest(model=model, identity=identity)
        answer = answered(partial(self.heartbeat, request))
        return self.shards is not None and answer.map_version == self.shards.version

    # Joining and uploads.

    def join(self, request: pb.JoinRequest) -> pb.JoinResponse:
        """See `Transport.join`. Takes the map."""
        answer = super().join(request)
        told = answer.member if answer.WhichOneof("result") == "member" else answer.create
        self.take(told.shards if told.HasField("shards") else None)
        return answer

    def upload(self, header: pb.UploadHeader, body: Body, layout: Layout | None) -> pb.UploadResponse:
        """See `Transport.upload`. To each rank its part."""
        if self.shards is None or layout is None:
            return super().upload(header, body, layout)
        parts = self.parts(layout)
        headers = uploads.headers(header, self.shards.version, parts)
        bodies = self.cut(layout, body)
        extras = body.pieces[len(body.segments) :]
        bodies[0] = Body(bodies[0].segments, [*bodies[0].pieces, *extras])
        calls = []
        for part, each, own in zip(parts, headers, bodies, strict=True):
            each.segments.extend(own.segments)
            calls.append((self.of(part) or self).begin_upload(each, own))
        answer: pb.UploadResponse = _all(self.lanes.answers(calls, self.spans))[0]
        return answer

    # Pulling.

    def pull(self, request: pb.PullRequest, layout: Layout | None) -> Pulled:
        """See `Transport.pull`. All parts at the newest version that rank 0 has."""
        known = [layout]

        def pull() -> Pulled:
            pulled, whole = self._pull_first(request, known[0])
            if self.shards is None:
                return pulled
            if pulled.header.unchanged:  # in every rank: a version is one of all
                return Joined(pulled.header, whole, pulled.body, [(self.parts(whole)[0], pulled)])
            return self.join_parts(request, pulled, whole, {})

        def map_changed() -> None:
            known[0] = None  # so that rank 0 brings the map

        return _at_one_version(pull, map_changed)

    def pull_state(self, request: pb.PullStateRequest, layout: Layout | None = None) -> Pulled:
        """See `Transport.pull_state`."""
        return _at_one_version(partial(self._pull_state, request), _nothing)

    def _pull_state(self, request: pb.PullStateRequest) -> Pulled:
        self._brought.clear()
        first = super().pull_state(request)
        if self.shards is None or not self._brought:
            return first
        whole = self._brought[0]

        def ask(to: Transport, part: Part) -> Exchange:
            about = self._about(request, part)
            about.version = first.header.version
            return to.begin_pull("PullState", about, part.layout)

        parts = self._with_others(first, whole, {}, ask)
        steps = steps_of(whole, parts)  # of which rank 0's are in `first`
        del first.header.steps[:]
        first.header.steps.extend(steps)
        return Joined(first.header, whole, first.body, parts)

    # Rows.

    def pull_rows(self, request: pb.PullRowsRequest, layout: Layout) -> Pulled:
        """See `Transport.pull_rows`. Of all ranks at one version."""

        def pull() -> Pulled:
            return self.begin_rows(request, layout)()

        return _at_one_version(pull, partial(self._learn_map, request.model, layout))

    def begin_rows(self, request: pb.PullRowsRequest, layout: Layout) -> Callable[[], Pulled]:
        """See `Transport.begin_rows`."""
        if self.shards is None:
            return super().begin_rows(request, layout)
        parts = self.parts(layout)
        version = self.shards.version
        asked = RowsCut(request, layout, parts, version)
        calls: list[Exchange] = []
        try:
            for part, own in zip(asked.parts, asked.requests, strict=True):
                calls.append((self.of(part) or self).begin_pull("PullRows", own, part.layout))
        except BaseException:
            for call in calls:
                call.cancel()
            raise
        first, known = parts[0].layout, pb.PullRowsRequest(model=request.model, map_version=version)
        known.manifest_hash = first.manifest_hash
        check_map = partial(super().pull_rows, known, first)
        return RowCalls(asked, calls, layout, self.lanes, self.spans, check_map).result

    def _learn_map(self, model: str, layout: Layout) -> None:
        """Ask rank 0 where the parts are by now. ManifestChanged if they are not of this layout."""
        self._brought.clear()
        pulled: Pulled = self.begin_pull("PullRows", pb.PullRowsRequest(model=model), None).result()
        whole = self._brought[0] if self._brought else pulled.layout
        if whole.manifest_hash != layout.manifest_hash:
            raise ManifestChanged(model=model)

    def _pull_first(self, request: pb.PullRequest, layout: Layout | None) -> tuple[Pulled, Layout]:
        """Rank 0's part, and the layout of the whole model."""
        self._brought.clear()
        own, known = request, layout
        if layout is None:
            own = pb.PullRequest()
            own.CopyFrom(request)
            own.manifest_hash = 0
        elif self.shards is not None:
            part = self.parts(layout)[0]
            own, known = self._of_part(request, part), part.layout
        pulled = super().pull(own, known)
        if self._brought:
            return pulled, self._brought[0]
        return pulled, pulled.layout if layout is None or known is layout else layout

    def _of_part(self, request: pb.PullRequest, part: Part, version: int | None = None) -> pb.PullRequest:
        own = self._about(request, part)
        if version is not None:
            own.options.version = version
            own.ClearField("identity")  # only rank 0 keeps leases
        return own

    def _about(self, request: R, part: Part) -> R:
        """A request about one part."""
        own = type(request)()
        own.CopyFrom(request)
        own.manifest_hash = part.layout.manifest_hash
        own.map_version = 0 if self.shards is None else self.shards.version
        return own

    def join_parts(
        self, request: pb.PullRequest, first: Pulled, whole: Layout, here: dict[int, Pulled]
    ) -> Pulled:
        """Rank 0's answer with the others' parts of the same version: those that are `here`, by rank, and pulled ones.

        VersionGone if a rank does not have that version any more.
        """

        def ask(to: Transport, part: Part) -> Exchange:
            return to.begin_pull("Pull", self._of_part(request, part, first.header.version), part.layout)

        return Joined(first.header, whole, first.body, self._with_others(first, whole, here, ask))

    def _with_others(
        self,
        first: Pulled,
        whole: Layout,
        here: Mapping[int, Pulled],
        ask: Callable[[Transport, Part], Exchange],
    ) -> list[tuple[Part, Pulled]]:
        """The parts and their answers of rank 0's version: of those `here`, and of the ranks that are asked."""
        at = first.header.timeline, first.header.version
        parts = self.parts(whole)
        found = {
            rank: pulled
            for rank, pulled in here.items()
            if (pulled.header.timeline, pulled.header.version) == at and not pulled.header.apart
        }
        lacking = [
            (to, part) for part in parts if (to := self.of(part)) is not None and part.rank not in found
        ]
        calls = [ask(to, part) for to, part in lacking]
        answers = _all(self.lanes.answers(calls, self.spans, are_equal=True)) if calls else []
        for (_, part), pulled in zip(lacking, answers, strict=True):
            if (pulled.header.timeline, pulled.header.version) != at:
                raise VersionGone(version=at[1], model="", rank=part.rank)
            found[part.rank] = pulled
        return [(part, found.get(part.rank, first)) for part in parts]

    def _layout_of(self, header: pb.PullHeader, known: Layout | None) -> Layout:
        if not header.manifest.parameters:
            return super()._layout_of(header, known)
        if not header.HasField("shards"):
            self.take(None)
            return super()._layout_of(header, known)
        self.take(header.shards)
        whole = Layout(header.manifest)
        self._brought[:] = [whole]
        return self.parts(whole)[0].layout

    # The end.

    def hurry(self, timeout_s: float) -> None:
        """See `Transport.hurry`."""
        super().hurry(timeout_s)
        for transport in self._others.values():
            transport.hurry(timeout_s)

    def close(self) -> None:
        """Close all channels."""
        self.lanes.close()
        for transport in self._others.values():
            transport.close()
        super().close()


def _at_one_version(pull: Callable[[], Pulled], map_changed: Callable[[], None]) -> Pulled:
    """Pull until all parts are of one version. VersionGone or MapChanged after TRIES."""
    tries = 0
    while True:
        try:
            return answered(pull)
        except (VersionGone, MapChanged) as error:
            tries += 1
            if tries == TRIES:
                raise
            if isinstance(error, MapChanged):
                map_changed()
            shield.check()  # newer versions have come meanwhile


def _all(outcomes: Sequence[Any]) -> list[Any]:
    """The answers, if each call has one; otherwise the failure is raised."""
    failure = failure_of(outcomes)
    if failure is not None:
        raise failure
    return list(outcomes)


def _nothing() -> None:
    """A pull that brings the map anyway."""
