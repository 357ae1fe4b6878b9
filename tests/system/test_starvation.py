"""A server that serves, and has no more memory, disk or descriptors: it says so by name, and nothing is lost or changed.

The limits are set on the running process and lifted again, so that every phase is tried on one server each.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from pushstep.client import Session
from pushstep.proto.errors import PushstepError
from pushstep.proto.errors.status import from_problem
from tests.support.servers.harness import RunningServer, running_server
from tests.support.workers.wire import state_of

# Larger than the 32 MiB from which on malloc gives back what was freed, always.
ELEMENTS = 9_000_000
ARENA_BYTES = 4 * ELEMENTS
SAME = ("timeline", "uid", "version", "export", "body", "steps")
GROUPS = [{"rule": "adagrad", "params": ["a"], "lr": 0.5}]


@dataclass
class Starved:
    """A server, whose connections were made while it had everything, and a model with a snapshot."""

    server: RunningServer
    owner: Session
    other: Session
    client: httpx.Client
    snapshot: str

    def rest(self, method: str, path: str) -> httpx.Response:
        """One call. What is refused is raised."""
        answer = self.client.request(method, f"/v1/models/m{path}")
        if answer.status_code >= 400:
            raise from_problem(answer.json())
        return answer


@contextlib.contextmanager
def starved(data: Path) -> Iterator[Starved]:
    with running_server(data) as server:
        owner = server.connect("m", retry_for_s=0.5)
        owner.create({"a": np.zeros(ELEMENTS, np.float32)}, GROUPS)
        owner.push({"a": np.ones(ELEMENTS, np.float32)})
        other = server.connect("other", retry_for_s=0.5)
        url = f"http://{server.http}"
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            snapshot = client.post("/v1/models/m/snapshots").json()["id"]
            yield Starved(server, owner, other, client, snapshot)


def describe(it: Starved) -> object:
    """What a newcomer asks first; here on a connection that there was room for."""
    return it.other._transport.describe(5.0, wait_for_ready=False)


def create(it: Starved) -> object:
    return it.other.create({"a": np.zeros(4 * ELEMENTS, np.float32)}, GROUPS)


def push(it: Starved) -> object:
    return it.owner.push({"a": np.ones(ELEMENTS, np.float32)})


def pull(it: Starved) -> object:
    return it.owner.pull()


def pull_state(it: Starved) -> object:
    return it.owner.pull_state()


def snapshot(it: Starved) -> object:
    return it.rest("POST", "/snapshots")


def restore(it: Starved) -> object:
    return it.rest("POST", f"/snapshots/{it.snapshot}/restore")


def content(it: Starved) -> object:
    return it.rest("GET", f"/snapshots/{it.snapshot}/content?format=torch")


def export(it: Starved) -> object:
    return it.rest("GET", "/export")


def export_torch(it: Starved) -> object:
    return it.rest("GET", "/export?format=torch")


def state_dict(it: Starved) -> object:
    return it.rest("GET", "/state-dict")


def delete_snapshot(it: Starved) -> object:
    return it.rest("DELETE", f"/snapshots/{it.snapshot}")


Phase = Callable[[Starved], object]


def outcome(phase: Phase, it: Starved) -> PushstepError | None:
    """What a phase is refused with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a step after a restore says that there was one
        try:
            phase(it)
        except PushstepError as error:
            return error
    return None


def check(
    it: Starved, phases: dict[Phase, set[str]], limit: int, value: Callable[[RunningServer], int]
) -> None:
    """Each phase under the limit is refused with a code that it may be, or done; without it all of them are done.

    A phase that must be refused is given without the code "".
    """
    whole = resource.prlimit(it.server.process.pid, limit)
    before = state_of(it.server, "m")
    found: dict[str, str] = {}
    for phase, codes in phases.items():
        for _ in range(3):
            # measured anew: what lay in cycles may have been given back meanwhile
            it.client.get(
                "/healthz"
            )  # so that its connection stands: an idle one is closed after some seconds
            resource.prlimit(it.server.process.pid, limit, (value(it.server), whole[1]))
            refused = outcome(phase, it)
            found[phase.__name__] = "" if refused is None else refused.code
            resource.prlimit(it.server.process.pid, limit, whole)
            if found[phase.__name__] in codes:
                break
        if refused is not None and refused.code in ("out_of_memory", "memory_short", "disk_full"):
            assert int(refused.fields["need"]) >= ARENA_BYTES
        assert refused is None or str(it.server.data) not in refused.message
    wrong = {
        phase.__name__: found[phase.__name__]
        for phase, codes in phases.items()
        if found[phase.__name__] not in codes
    }
    assert wrong == {}
    log = it.server.log.read_text()
    assert "Traceback" not in log
    assert "internal error" not in log
    after = state_of(it.server, "m")
    if not {"push", "restore"} & {name for name, code in found.items() if code == ""}:
        assert {key: after[key] for key in SAME} == {key: before[key] for key in SAME}
    for phase in phases:
        assert outcome(phase, it) is None, phase.__name__


def hardly_more(server: RunningServer) -> int:
    """Address space for threads and small things, and for no arena."""
    return size_of(server) + ARENA_BYTES // 2


def size_of(server: RunningServer) -> int:
    """The bytes of address space that the process has."""
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def test_without_memory(data: Path) -> None:
    no_memory = {"out_of_memory"}
    phases: dict[Phase, set[str]] = {
        create: {"memory_short", "out_of_memory"},
        push: {"memory_short", ""},  # memory of an earlier one is kept for the next
        pull_state: no_memory,
        snapshot: {""},  # it is read a slice at a time
        restore: no_memory,
        content: no_memory,
        export: no_memory,
        export_torch: no_memory,
        state_dict: no_memory,
    }
    with starved(data) as it:
        check(it, phases, resource.RLIMIT_AS, hardly_more)


def test_without_room_on_the_disk(data: Path) -> None:
    full = {"disk_full"}
    phases: dict[Phase, set[str]] = {
        create: full,  # its first snapshot
        push: {""},
        pull_state: {""},
        snapshot: full,
        export: full,
        export_torch: full,
        content: full,
        restore: {""},
        state_dict: {""},
    }
    with starved(data) as it:
        check(it, phases, resource.RLIMIT_FSIZE, lambda _: 1 << 20)
        assert list(data.glob("tmp-export-*")) == []
        assert list((data / "models" / "m" / "snapshots").glob("tmp-*")) == []


def free_descriptor(server: RunningServer) -> int:
    """The lowest number that no descriptor of the process has: a limit of it leaves none."""
    taken = {int(name) for name in os.listdir(f"/proc/{server.process.pid}/fd")}
    return next(number for number in range(len(taken) + 1) if number not in taken)


def test_without_descriptors(data: Path) -> None:
    none_left = {"storage_failed"}
    phases: dict[Phase, set[str]] = {
        describe: {""},
        create: none_left,
        push: {""},
        pull: {""},
        pull_state: {""},
        snapshot: none_left,
        export: none_left,
        content: none_left,
        restore: none_left,
        state_dict: {""},
        delete_snapshot: none_left,
    }
    with starved(data) as it:
        check(it, phases, resource.RLIMIT_NOFILE, free_descriptor)


def test_starved_at_its_end(data: Path) -> None:
    """Of memory a stop takes none; of disk it says what it could not save, and the last snapshot is there."""
    for limit, value, status in ((resource.RLIMIT_AS, None, 0), (resource.RLIMIT_FSIZE, 1 << 20, 3)):
        with starved(data / str(status)) as it:
            held = state_of(it.server, "m")
            room = hardly_more(it.server) if value is None else value
            resource.prlimit(it.server.process.pid, limit, (room, room))
            assert it.server.stop(signal.SIGTERM) == status
        with running_server(data / str(status)) as again:
            back = state_of(again, "m")
            assert back["timeline"] == held["timeline"] + (status == 3)
            assert [back[key] for key in SAME[1:]] == [held[key] for key in SAME[1:]]
