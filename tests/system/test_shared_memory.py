"""A worker on the server's own host: the same bits as over frames, through memory that both map."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import socket
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pushstep.client import Outcome, Session
from pushstep.optim import Adagrad
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors.status import from_status
from pushstep.proto.shared_memory.local_socket import HEAD_BYTES, Method, Status, framed, status_of
from tests.support.servers.harness import RunningServer, running_server, wait_until
from tests.support.trainings.network import Network
from tests.support.trainings.optimizers import Make, adadelta, adagrad, both
from tests.support.trainings.twins import Twins
from tests.support.workers.wire import GROUPS, PARAMETERS


def files_of(pid: int) -> list[str]:
    """What the descriptors of a process are."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(entry))
        except FileNotFoundError:
            continue
    return found


def regions_of(pid: int) -> int:
    """How many pieces of shared memory a process holds open or mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sum("memfd:pushstep" in line for line in [*files_of(pid), *maps])


def shares(session: Session) -> bool:
    """Whether a session's last step went through shared memory."""
    return session.memory.region is not None and session.memory.region.local_socket.is_open()


@pytest.mark.parametrize("door", ["unix", "loopback"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("make", [adadelta, adagrad, both])
def test_every_step_is_the_local_optimizers(
    server: RunningServer, model_name: str, make: Make, sparse: bool, door: str
) -> None:
    address = server.grpc if door == "loopback" else f"unix:{server.unix}"
    with server.connect(model_name, address=address, shared_memory=True) as session:
        twins = Twins(session, Network(sparse=sparse), make)
        twins.step(*range(8))
        twins.check_state()
        assert shares(session)
        lying = [p for p in twins.model.parameters() if p.grad is not None and not p.grad.is_sparse]
        assert lying
        assert all(session.memory.region is not None and session.memory.region.holds(p.grad) for p in lying)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [adadelta, adagrad])
def test_in_other_dtypes(server: RunningServer, model_name: str, make: Make, dtype: torch.dtype) -> None:
    with server.connect(model_name, shared_memory=True) as session:
        twins = Twins(session, Network(dtype=dtype), make)
        twins.step(*range(5))
        twins.check_state()
        assert shares(session)


def test_arrays(server: RunningServer, model_name: str) -> None:
    draw = np.random.default_rng(0)
    shared = server.connect(model_name, shared_memory=True)
    frames = server.connect(f"{model_name}-frames")
    for session in (shared, frames):
        session.create(PARAMETERS, GROUPS)
    for number in range(6):
        grads: dict[str, Any] = {
            name: draw.normal(size=value.shape).astype(np.float32) for name, value in PARAMETERS.items()
        }
        if number % 2:
            del grads["weight"]
            grads["table"] = (np.array([3, 1, 3]), draw.normal(size=(3, 3)).astype(np.float32))
        (receipt, got), (_, expected) = shared.exchange(grads), frames.exchange(grads)
        assert receipt.outcome is Outcome.APPLIED
        assert {name: a.tobytes() for name, a in got.items()} == {n: a.tobytes() for n, a in expected.items()}
    assert shares(shared)
    assert not shares(frames)


def test_partial_pushes_and_a_group_that_is_added(server: RunningServer, model_name: str) -> None:
    made = [torch.nn.Parameter(torch.randn(n, 3)) for n in (4, 1000, 2)]
    here = [nn.Parameter(p.detach().clone()) for p in made]
    with server.connect(model_name, shared_memory=True) as session:
        remote = session.attach(torch.optim.Adagrad(made[:2]), names=["a", "b"])
        local = Adagrad(here[:2])
        for number in range(8):
            if number == 4:
                remote.add_param_group({"params": [made[2]], "lr": 0.5})
                local.add_param_group({"params": [here[2]], "lr": 0.5})
            count = 2 if number < 4 else 3
            for optimizer, parameters in ((remote, made), (local, here)):
                optimizer.zero_grad()
                used = parameters[number % 2 : count]
                torch.stack([p.square().sum() for p in used]).sum().backward()
                optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(made, here, strict=True)), number
            assert shares(session)


def test_gradients_are_torchs_in_every_way(server: RunningServer, model_name: str) -> None:
    parameter = nn.Parameter(torch.ones(5))
    with server.connect(model_name, shared_memory=True) as session:
        remote = session.attach(torch.optim.Adagrad([parameter]))
        region = session.memory.region
        assert region is not None

        def backward(factor: float) -> torch.Tensor:
            (parameter * factor).sum().backward()
            assert parameter.grad is not None
            return parameter.grad

        first = backward(1)
        assert region.holds(first)
        assert backward(2) is first  # accumulated in place, as autograd does
        assert first.tolist() == [3] * 5
        remote.step()
        held = [first]
        for factor in (4, 5, 6):  # the user looks at every gradient so far: more of them than there are slots
            remote.zero_grad()
            assert parameter.grad is None
            held.append(backward(factor))
            remote.step()
        assert [g.tolist()[0] for g in held] == [3, 4, 5, 6]
        alias, held = held[0][2:], []
        del first
        remote.zero_grad()
        backward(7)
        assert alias.tolist() == [3] * 3
        remote.zero_grad(set_to_none=False)
        assert parameter.grad is not None
        assert parameter.grad.tolist() == [0] * 5
        parameter.grad = torch.full((5,), 9.0)  # a user's own
        remote.step()
        assert remote.last_receipt is not None
        assert remote.last_receipt.gradient_norm == pytest.approx(9 * 5**0.5)
        session.memory.drop()
        assert parameter.grad.tolist() == [9] * 5


def test_a_child_of_fork_has_gradients_of_its_own(server: RunningServer, model_name: str) -> None:
    parameter = nn.Parameter(torch.ones(5))
    with server.connect(model_name, shared_memory=True) as session:
        remote = session.attach(torch.optim.Adagrad([parameter]))
        parameter.sum().backward()
        assert parameter.grad is not None
        child = os.fork()
        if child == 0:
            right = parameter.grad.tolist() == [1] * 5 and session.memory.region is None
            parameter.grad.fill_(100)
            os._exit(0 if right else 1)
        _, status = os.waitpid(child, 0)
        assert status == 0
        assert parameter.grad.tolist() == [1] * 5
        remote.step()
        assert shares(session)


def test_a_restore_and_a_new_epoch_open_another_region(server: RunningServer, model_name: str) -> None:
    with server.connect(model_name, shared_memory=True) as session:
        session.create(PARAMETERS, GROUPS)
        session.exchange({"bias": np.ones(4, np.float32)})
        first = session.memory.region
        snapshot = server.rest("POST", f"/v1/models/{model_name}/snapshots").json()["id"]
        server.rest("POST", f"/v1/models/{model_name}/snapshots/{snapshot}/restore").raise_for_status()
        with pytest.warns(RuntimeWarning, match="restored"):
            receipt, _ = session.exchange({"bias": np.ones(4, np.float32)})
        assert receipt.outcome is Outcome.SUPERSEDED
        receipt, _ = session.exchange({"bias": np.ones(4, np.float32)})
        assert receipt.outcome is Outcome.APPLIED
        assert session.memory.region is not first
        assert shares(session)


def test_an_evicted_worker_loses_its_region(server: RunningServer, model_name: str) -> None:
    with server.connect(model_name, shared_memory=True) as session:
        session.create(PARAMETERS, GROUPS)
        session.exchange({"bias": np.ones(4, np.float32)})
        region = session.memory.region
        assert region is not None
        server.rest("DELETE", f"/v1/models/{model_name}/workers/w0").raise_for_status()
        wait_until(lambda: not region.local_socket.is_open())


@pytest.mark.parametrize(
    "sent",
    [b"\x07\0\0\0\0", b"\x01\xff\xff\xff\xff", b"\x02\x03\0\0\0abc", b"\x02\0\0\0\0"],
    ids=["method", "length", "message", "empty"],
)
def test_what_is_no_call_is_refused_by_name(server: RunningServer, model_name: str, sent: bytes) -> None:
    with server.connect(model_name, shared_memory=True) as session:
        session.create(PARAMETERS, GROUPS)
        _, before = session.exchange({"bias": np.ones(4, np.float32)})
        assert session.memory.region is not None
        connection = session.memory.region.local_socket._connection
        connection.settimeout(10)
        connection.sendall(sent)
        status, length = status_of(connection.recv(HEAD_BYTES, socket.MSG_WAITALL))
        assert status is Status.REFUSED
        error = from_status(connection.recv(length, socket.MSG_WAITALL))
        assert error.code in ("malformed_frame", "message_too_large")
        connection.setblocking(False)
        assert all(np.array_equal(before[name], value) for name, value in session.pull().items())
        receipt, _ = session.exchange({"bias": np.ones(4, np.float32)})
        assert receipt.version == 2


def test_a_worker_that_speaks_out_of_turn_harms_nobody(server: RunningServer, model_name: str) -> None:
    """A second call while the first is under way means that nobody waits for that any more: the server hangs up."""
    with server.connect(model_name, shared_memory=True) as session:
        session.create(PARAMETERS, GROUPS)
        session.exchange({"bias": np.ones(4, np.float32)})
        region = session.memory.region
        assert region is not None
        header = pb.PushHeader(model=model_name, identity=session.member().identity(), region=region.number)
        message = pb.PushRequest(header=header, commit=pb.PushCommit()).SerializeToString()
        connection = region.local_socket._connection
        connection.sendall(100 * framed(Method.PUSH, message))
        connection.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(1 << 16):
                pass
        assert not region.local_socket.is_open()
        receipt, _ = session.exchange({"bias": np.ones(4, np.float32)})
        assert receipt.version == 2
        assert shares(session)


def test_frames_when_the_budget_is_taken_or_sharing_is_off(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gradient = {"w": np.ones(1_000_000, np.float32)}
    with running_server(data / "tight", "--staging-bytes", "30000000") as tight:
        first = tight.connect("m", "w0", shared_memory=True)
        second = tight.connect("m", "w1", shared_memory=True)
        first.create({"w": np.zeros(1_000_000, np.float32)})
        first.exchange(gradient)
        for _ in range(2):
            second.exchange(gradient)
        assert (shares(first), shares(second)) == (True, False)
        assert [r.levelname for r in caplog.records if "budget" in r.getMessage()] == ["WARNING"]
    with running_server(data / "off", "--no-shared-memory") as off:
        session = off.connect("m", address=f"unix:{off.unix}", shared_memory=True)
        session.create({"w": np.zeros(3, np.float32)})
        session.exchange({"w": np.ones(3, np.float32)})
        assert not shares(session)
        assert not Path(f"{off.unix}.memory").exists()


def test_the_memory_is_sealed_and_handed_to_who_has_the_token(server: RunningServer, model_name: str) -> None:
    with server.connect(model_name, shared_memory=True) as session:
        session.create(PARAMETERS, GROUPS)
        member = session.member()
        request = pb.OpenRegionRequest(
            model=model_name, identity=member.identity(), manifest_hash=member.layout.manifest_hash
        )
        opened = session._worker.membership.transport.open_region(request)
        assert stat.S_IMODE(os.stat(opened.path).st_mode) == 0o600
        for token in (b"\0" * 16, opened.token):
            with socket.socket(socket.AF_UNIX) as line:
                line.connect(opened.path)
                line.sendall(token)
                _, fds, _, _ = socket.recv_fds(line, 1, 2)
                assert len(fds) == (2 if token == opened.token else 0)
                for fd in fds:
                    for size in (0, 1 << 30):
                        with pytest.raises(PermissionError):
                            os.ftruncate(fd, size)
                if fds:
                    with pytest.raises(PermissionError):
                        mmap.mmap(fds[1], opened.answer_bytes)  # parameters are read only
                for fd in fds:
                    os.close(fd)


def test_two_hundred_sessions_leave_nothing(server: RunningServer, model_name: str) -> None:
    def step_once(number: int) -> None:
        with server.connect(model_name, f"w{number % 4}", shared_memory=True) as session:
            session.create({"w": np.zeros(100, np.float32)})
            session.exchange({"w": np.ones(100, np.float32)})
            assert shares(session)
        server.sessions.remove(session)

    pid = server.process.pid  # which may hold regions of other tests' sessions
    gc.collect()
    regions, files, own = regions_of(pid), len(files_of(pid)), regions_of(os.getpid())
    for number in range(200):
        step_once(number)
    wait_until(lambda: regions_of(pid) <= regions)
    wait_until(lambda: len(files_of(pid)) <= files + 5)
    gc.collect()
    assert regions_of(os.getpid()) <= own


def test_what_was_made_in_inference_mode_is_written_to_outside_of_it(
    server: RunningServer, model_name: str
) -> None:
    gradients = {"w": np.ones(1000, np.float32)}
    with server.connect(model_name, shared_memory=True) as session:
        session.create({"w": np.zeros(1000, np.float32)})
        for inside in (True, False, True):
            with torch.inference_mode(inside):
                session.push(gradients)
                session.exchange(gradients)
                session.pull()
        assert shares(session)
        assert session.version == 6
