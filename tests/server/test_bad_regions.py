"""Sessions that ask for shared memory and go away, or ask again at once: nothing of it outlasts them."""

from __future__ import annotations

import contextlib
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from pushstep.client import Outcome
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import NoSharedMemory
from pushstep.proto.errors.status import from_rpc_error
from pushstep.proto.shared_memory.local_socket import Method
from tests.support.servers.harness import RunningServer, running_server, wait_until
from tests.support.workers.wire import RawLocalSocket, RawWorker, Wire, created, untouched
from tests.system.test_shared_memory import files_of, regions_of

ELEMENTS = 4_000_000  # long enough to make that a caller can go away meanwhile


def test_a_session_that_opens_regions_in_a_loop_leaves_none(data: Path) -> None:
    with running_server(data) as server:
        with server.connect("m", "w", shared_memory=False) as session:
            session.create({"w": np.zeros(ELEMENTS, np.float32)})
            member = session.member()
            request = pb.OpenRegionRequest(
                model="m", identity=member.identity(), manifest_hash=member.layout.manifest_hash
            )
            channel = grpc.insecure_channel(server.grpc)
            call = channel.unary_unary(
                "/pushstep.v1.TrainingService/OpenRegion",
                request_serializer=pb.OpenRegionRequest.SerializeToString,
                response_deserializer=pb.OpenRegionResponse.FromString,
            )

            def ask(number: int) -> str:
                try:
                    call(request, timeout=0.02 if number % 2 else 30.0)
                except grpc.RpcError as error:
                    known = from_rpc_error(error)
                    assert known is None or isinstance(known, NoSharedMemory), known
                    return "refused"
                return "opened"

            with ThreadPoolExecutor(8) as asking:
                answers = list(asking.map(ask, range(40)))
            assert "refused" in answers
            assert ask(0) == "opened"
            wait_until(lambda: regions_of(server.process.pid) <= 4)  # of one: two descriptors, two mappings
            receipt = session.push({"w": np.ones(ELEMENTS, np.float32)})
            assert receipt.outcome is Outcome.APPLIED
            channel.close()
        wait_until(lambda: regions_of(server.process.pid) == 0)


def test_connections_that_say_nothing_are_few_and_end(data: Path) -> None:
    with running_server(data) as server, contextlib.ExitStack() as stack:
        before = len(files_of(server.process.pid))
        silent = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(200)]
        for line in silent:
            line.connect(f"{server.unix}.memory")
        wait_until(lambda: len(files_of(server.process.pid)) <= before + 70)
        session = stack.enter_context(server.connect("m", shared_memory=True))
        session.create({"w": np.zeros(3, np.float32)})
        assert session.push({"w": np.ones(3, np.float32)}).outcome is Outcome.APPLIED
        wait_until(lambda: len(files_of(server.process.pid)) <= before + 10)


UNNAMED = {
    "frames": {"region": False},
    "frames whose answer is shared": {"region": False, "pull": True},
    "shared, with an answer in frames": {"region": True, "pull": False},
    "a skip push": {"region": False, "skip": True},
}


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("case", UNNAMED)
def test_a_call_over_the_local_socket_names_its_region(
    server: RunningServer, model_name: str, case: str, method: Method
) -> None:
    """One that does not, for its gradients or its answer, is refused before anything is stepped."""
    wanted = UNNAMED[case]
    created(server, model_name)
    with contextlib.closing(Wire(server.grpc)) as wire:
        raw = RawWorker(wire, model_name)
        with contextlib.closing(RawLocalSocket(raw)) as line:
            header = raw.header(
                [] if wanted.get("skip") else [raw.dense("bias")], skip=bool(wanted.get("skip"))
            )
            header.region = line.region if wanted["region"] else 0
            if wanted.get("pull"):
                header.pull.region = line.region
            shared = pb.PushRequest(header=header, commit=pb.PushCommit())
            if not wanted["region"]:
                shared.payload = bytes(16)
            if method is Method.PUSH and wanted["region"]:
                line.call(method, shared.SerializeToString())  # whose answer is no matter of frames
                return
            with untouched(server, model_name):
                assert line.refused(method, shared.SerializeToString()).code == "malformed_frame"
            raw.push(raw.good())  # and gRPC takes the same worker's frames
    assert "internal error" not in server.log.read_text()
