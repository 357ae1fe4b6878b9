"""A program that knows the service by its .proto files alone.

    python stock_client.py STUBS ADDRESS EXISTING NEW

It uses grpcio, protobuf and what stock grpcio-tools generated into STUBS, never pushstep's own code; everything it
sends is a plain message. It joins the model EXISTING and creates the model NEW, trains both a little, and prints
what it was told as one line of JSON.
"""

import copy
import importlib.machinery
import importlib.util
import json
import struct
import sys
from pathlib import Path

STUBS, ADDRESS, EXISTING, NEW = sys.argv[1:]


class OnlyStubs:
    """Finds pushstep's modules among the stubs and nowhere else."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "pushstep":
            return None
        place = Path(STUBS, *name.split("."))
        if place.is_dir():
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(place)]
            return spec
        file = place.with_suffix(".py")
        if not file.is_file():
            raise ImportError(f"{name} was not generated")
        return importlib.util.spec_from_file_location(name, file)


sys.meta_path.insert(0, OnlyStubs())

import grpc  # noqa: E402 - not before the stubs are in place

from pushstep.proto import training_pb2, training_pb2_grpc, types_pb2  # noqa: E402

F32 = types_pb2.DTYPE_FLOAT32


def floats(*values):
    return struct.pack(f"<{len(values)}f", *values)


def ids(*values):
    return struct.pack(f"<{len(values)}q", *values)


def unpacked(payload):
    return list(struct.unpack(f"<{len(payload) // 4}f", payload))


def int8(values):
    """One parameter as DTYPE_INT8's comment says."""
    parts = []
    for start in range(0, len(values), 256):
        block = values[start : start + 256]
        (scale,) = unpacked(floats(max(abs(value) for value in block) / 127))
        codes = (round(value / scale) if scale else 0 for value in block)
        parts.append(floats(scale) + struct.pack(f"<{len(block)}b", *codes))
    return b"".join(parts)


def chunks(kind, payloads, size):
    """Messages of at most `size` bytes of payload."""
    for segment, payload in enumerate(payloads):
        for offset in range(0, len(payload), size):
            yield kind(segment=segment, offset=offset, payload=payload[offset : offset + size])


def place_of(manifest, name):
    """(arena, start, stop) of a parameter."""
    for parameter in manifest.parameters:
        if parameter.name == name:
            size = 1
            for length in parameter.shape:
                size *= length
            return parameter.arena, parameter.offset, parameter.offset + size
    raise KeyError(name)


def dense(manifest, first, last=None):
    """A segment from one parameter to another of the same arena."""
    arena, start, stop = place_of(manifest, first)
    if last is not None:
        _, _, stop = place_of(manifest, last)
    return types_pb2.Segment(arena=arena, start=start, stop=stop, dtype=F32)


def sparse(manifest, name, rows):
    arena, start, stop = place_of(manifest, name)
    return types_pb2.Segment(arena=arena, start=start, stop=stop, dtype=F32, rows=rows)


class Arrays:
    """Parameters, put together from what pulls answer."""

    def __init__(self, manifest):
        self.manifest = manifest
        self.values = {}
        self.version = None

    def take(self, answer):
        """A stream of PullResponse; its header."""
        messages = list(answer)
        header = messages[0].header
        bodies = [bytearray() for _ in header.segments]
        for message in messages:
            if message.payload:
                assert message.offset == len(bodies[message.segment])
                bodies[message.segment] += message.payload
        for segment, body in zip(header.segments, bodies, strict=True):
            self._place(segment, bytes(body))
        self.version = header.version
        return header

    def _place(self, segment, body):
        for parameter in self.manifest.parameters:
            arena, start, stop = place_of(self.manifest, parameter.name)
            if arena != segment.arena or start < segment.start or stop > segment.stop:
                continue
            key = f"{parameter.name}.{segment.state}" if segment.state else parameter.name
            if not segment.HasField("rows"):
                at = 4 * (start - segment.start)
                self.values[key] = unpacked(body[at : at + 4 * (stop - start)])
                continue
            width = (stop - start) // parameter.shape[0]
            found = struct.unpack(f"<{segment.rows}q", body[: 8 * segment.rows])
            rows = unpacked(body[8 * segment.rows :])
            for index, row in enumerate(found):
                self.values[key][row * width : (row + 1) * width] = rows[index * width : (index + 1) * width]


class Worker:
    """A member of a model, with its next sequence."""

    def __init__(self, service, model, member):
        self.service = service
        self.model = model
        self.identity = member.identity
        self.member = member
        self.arrays = Arrays(member.manifest)

    def header(self, segments, base, **more):
        self.identity.sequence += 1
        return training_pb2.PushHeader(
            model=self.model,
            identity=self.identity,
            base_version=base,
            manifest_hash=self.member.manifest_hash,
            segments=segments,
            **more,
        )

    def push(self, header, payloads, size=1 << 20):
        """A commit without a digest is enough."""
        messages = [training_pb2.PushRequest(header=header)]
        messages += chunks(training_pb2.PushRequest, payloads, size)
        messages.append(training_pb2.PushRequest(commit=training_pb2.PushCommit()))
        return self.service.Push(iter(messages), timeout=20).receipt

    def exchange(self, header, payloads):
        messages = [training_pb2.PushRequest(header=header)]
        messages += chunks(training_pb2.PushRequest, payloads, 1 << 20)
        messages.append(training_pb2.PushRequest(commit=training_pb2.PushCommit()))
        return self.arrays.take(self.service.Exchange(iter(messages), timeout=20))

    def pull(self):
        request = training_pb2.PullRequest(model=self.model, identity=self.identity)
        return self.arrays.take(self.service.Pull(request, timeout=20))

    def leave(self):
        self.service.Leave(training_pb2.LeaveRequest(model=self.model, identity=self.identity), timeout=20)


def told(receipt):
    return {
        "outcome": types_pb2.Outcome.Name(receipt.outcome),
        "version": receipt.version,
        "sequence": receipt.identity.sequence,
        "staleness": receipt.staleness,
        "gradient_norm": receipt.gradient_norm,
        "lr": [group.values["lr"].number for group in receipt.groups],
        "duplicates": receipt.duplicates,
    }


def create(service):
    """A model from nothing: a manifest, a ticket, the values."""
    number = types_pb2.Hyperparameter
    manifest = types_pb2.Manifest(
        parameters=[
            types_pb2.Parameter(name="table", shape=[6, 2], dtype=F32, group=0),
            types_pb2.Parameter(name="weights", shape=[3], dtype=F32, group=1),
            types_pb2.Parameter(name="bias", shape=[], dtype=F32, group=1),
        ],
        groups=[
            types_pb2.ParamGroup(rule="adagrad", values={"lr": number(number=0.5)}),
            types_pb2.ParamGroup(rule="adadelta", values={"maximize": number(flag=True)}),
        ],
    )
    request = training_pb2.JoinRequest(model=NEW, worker="stock", manifest=manifest)
    answer = service.Join(request, timeout=20)
    assert answer.WhichOneof("result") == "create"
    ticket = answer.create
    header = training_pb2.UploadHeader(
        model=NEW,
        kind=training_pb2.UPLOAD_KIND_CREATE,
        ticket=ticket.ticket,
        manifest=ticket.manifest,
        segments=[dense(ticket.manifest, "table"), dense(ticket.manifest, "weights", "bias")],
    )
    payloads = [floats(*(index / 8 for index in range(12))), floats(1.0, -2.0, 3.0, 0.25)]
    messages = [training_pb2.UploadRequest(header=header)]
    # odd sizes: a chunk need not end where an element does
    messages += chunks(training_pb2.UploadRequest, payloads, 7)
    member = service.Upload(iter(messages), timeout=20).member
    return Worker(service, NEW, member)


def train_new(service):
    worker = create(service)
    manifest = worker.member.manifest
    found = {"created_at": worker.member.version, "lead": worker.member.lead}

    both = [sparse(manifest, "table", 3), dense(manifest, "weights", "bias")]
    # row 4 twice: its rows are summed
    payloads = [ids(4, 1, 4) + floats(0.1, 0.2, 0.3, 0.4, 0.5, 0.6), floats(0.1, -0.2, 0.3, 0.7)]
    found["pushed"] = told(worker.push(worker.header(both, 0), payloads, size=5))
    worker.pull()
    found["pulled"] = [worker.arrays.version, copy.deepcopy(worker.arrays.values)]

    payloads = [ids(5) + floats(-0.25, 0.125), floats(0.5)]
    parts = [sparse(manifest, "table", 1), dense(manifest, "bias")]
    pull = training_pb2.PullOptions(have_version=worker.arrays.version)
    header = worker.header(parts, worker.arrays.version, pull=pull, metrics={"loss": 0.5})
    answer = worker.exchange(header, payloads)
    found["exchanged"] = [told(answer.receipt), worker.arrays.version, copy.deepcopy(worker.arrays.values)]
    found["rows_sent"] = [int(s.rows) for s in answer.segments if s.HasField("rows")]

    # the same push again, as after an answer that was lost
    found["again"] = told(worker.push(header, payloads))

    request = training_pb2.PullRowsRequest(model=NEW, parameter="table", ids=[5, 0])
    rows = list(service.PullRows(request, timeout=20))
    found["rows"] = unpacked(b"".join(message.payload for message in rows)[16:])

    state = Arrays(manifest)
    answer = state.take(service.PullState(training_pb2.PullStateRequest(model=NEW), timeout=20))
    found["state"] = [list(answer.steps), state.values]
    worker.leave()
    return found


def train_existing(service):
    request = training_pb2.JoinRequest(model=EXISTING, worker="stock")
    worker = Worker(service, EXISTING, service.Join(request, timeout=20).member)
    worker.pull()
    found = {"pulled": [worker.arrays.version, copy.deepcopy(worker.arrays.values)]}
    header = worker.header([dense(worker.member.manifest, "a")], worker.arrays.version)
    found["pushed"] = told(worker.push(header, [floats(1.0, 2.0, -3.0, 0.5)]))
    nonsense = worker.header([dense(worker.member.manifest, "a")], worker.arrays.version)
    try:
        worker.push(nonsense, [floats(1.0, float("nan"), 0.0, 0.0)])
    except grpc.RpcError as error:
        found["refused"] = error.code().name
    worker.pull()
    found["after"] = [worker.arrays.version, copy.deepcopy(worker.arrays.values)]
    # in fewer bytes: codes under a scale, then two of the four elements
    segment = dense(worker.member.manifest, "a")
    segment.dtype = types_pb2.DTYPE_INT8
    header = worker.header([segment], worker.arrays.version)
    found["int8"] = told(worker.push(header, [int8([1.0, 2.0, -3.0, 0.5])], size=5))
    segment = dense(worker.member.manifest, "a")
    segment.elements = 2
    header = worker.header([segment], worker.arrays.version)
    found["elements"] = told(worker.push(header, [struct.pack("<2I", 1, 3) + floats(0.25, -4.0)]))
    backwards = worker.header([segment], worker.arrays.version)
    try:
        worker.push(backwards, [struct.pack("<2I", 3, 1) + floats(0.25, -4.0)])
    except grpc.RpcError as error:
        found["backwards"] = error.code().name
    worker.pull()
    found["smaller"] = [worker.arrays.version, copy.deepcopy(worker.arrays.values)]
    worker.leave()
    return found


def main():
    with grpc.insecure_channel(ADDRESS) as channel:
        service = training_pb2_grpc.TrainingServiceStub(channel)
        models = list(service.Describe(training_pb2.DescribeRequest(), timeout=20).models)
        found = {"existing": train_existing(service), "new": train_new(service), "models": models}
    ours = [module for name, module in sys.modules.items() if name.partition(".")[0] == "pushstep"]
    found["files"] = sorted(module.__file__ for module in ours if getattr(module, "__file__", None))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
