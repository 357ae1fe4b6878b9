"""A session ends with whoever holds it: closed, dropped, or its process at its end, however that comes about."""

from __future__ import annotations

import gc
import signal
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from pushstep.client import Session
from tests.support.processes.nursery import Nursery, nursery
from tests.support.servers.harness import RunningServer, wait_until
from tests.support.servers.operators import show_worker
from tests.support.servers.proxy import Proxy

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlap": {"overlap": True},
    "prefetch": {"prefetch": True},
}


def state(server: RunningServer, model: str, worker: str = "w0") -> str:
    return str(show_worker(server, model, worker)["state"])


# --- dropped


def train_and_drop(session: Session, module: nn.Module, **options: Any) -> weakref.ref[Session]:
    optimizer = session.attach(torch.optim.Adagrad(module.parameters()), module=module, **options)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    return weakref.ref(session)


@pytest.mark.parametrize("shared_memory", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_session_ends(
    server: RunningServer, model_name: str, kind: str, shared_memory: bool
) -> None:
    """The module lives on: nothing of the session is left on it, nor in any thread."""
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = set(threading.enumerate())
    session = server.connect(model_name, shared_memory=shared_memory)
    server.sessions.remove(session)
    known = train_and_drop(session, module, **KINDS[kind])
    del session

    def is_gone() -> bool:
        gc.collect()  # the last push may have been in flight
        return known() is None

    wait_until(is_gone)
    wait_until(lambda: state(server, model_name) == "left")
    wait_until(lambda: {t.name for t in set(threading.enumerate()) - before} <= {"pushstep-waits"})
    hooks: Any = [p._post_accumulate_grad_hooks for p in module.parameters()]  # type: ignore[attr-defined]
    assert not any(hooks)
    module(torch.ones(2, 4)).sum().backward()


def test_nobody_waits_for_a_dropped_session(server: RunningServer, model_name: str) -> None:
    sync = {"policy": "sync", "min_workers": 1, "timeout_s": None}
    one, other = server.connect(model_name, "w0"), server.connect(model_name, "w1")
    server.sessions.remove(other)
    for session in (one, other):
        session.create({"a": torch.zeros(3)}, policy=sync)
    pushing = threading.Thread(target=lambda: one.push({"a": torch.ones(3)}))
    pushing.start()
    wait_until(lambda: show_worker(server, model_name, "w0")["round"] == "present")
    del other, session
    gc.collect()
    pushing.join(60)
    assert not pushing.is_alive()
    assert one.last_receipt is not None and one.last_receipt.version == 1


# --- the end of the process

BEGIN = """
import os, signal, sys, threading, torch
from pushstep.client import connect
address, model, kind, shared_memory = sys.argv[1:]
def train(worker="w0"):
    global session, optimizer
    session = connect(address, model=model, worker=worker, shared_memory=shared_memory == "True")
    module = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Linear(100, 100))
    options = {} if kind == "plain" else {kind: True}
    optimizer = session.attach(torch.optim.Adagrad(module.parameters()), module=module, **options)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.ones(1, 100)).sum().backward()
        optimizer.step()
"""
CTRL_C = "signal.signal(signal.SIGINT, signal.default_int_handler); signal.raise_signal(signal.SIGINT)"
# None: Python says that a signal ended it, but for some libraries at exit (torch._dynamo's, where tabulate is installed)
ENDS: dict[str, tuple[str, int | None]] = {
    "the end of the script": ("train()", 0),
    "SystemExit": ("train(); raise SystemExit(3)", 3),
    "an exception": ("train(); raise ValueError('a mistake')", 1),
    "Ctrl-C": (f"train(); {CTRL_C}", None),
    "SIGTERM with a handler": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); train(); signal.raise_signal(signal.SIGTERM)",
        5,
    ),
    "in a thread": ("t = threading.Thread(target=train); t.start(); t.join()", 0),
    "in a thread that outlasts the script": ("threading.Thread(target=train).start()", 0),
    "in a forked child": (
        "train('w1'); child = os.fork()\n"
        "if child: session.close(); sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "train()",
        0,
    ),
    "in a child of multiprocessing": (
        "import multiprocessing, warnings; warnings.simplefilter('ignore'); train('w1')\n"
        "p = multiprocessing.get_context('fork').Process(target=train); p.start(); p.join(); sys.exit(p.exitcode)",
        0,
    ),
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("scripts")) as made:
        yield made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ENDS)
def test_a_process_that_ends_leaves(
    server: RunningServer, model_name: str, scripts: Nursery, end: str, kind: str
) -> None:
    """Without close(), with whatever is under way, and with the exit status that it would have by itself."""
    code, expected = ENDS[end]
    if expected is None:
        expected = scripts.start(f"import signal; {CTRL_C}").wait()
    script = scripts.start(BEGIN + code, server.grpc, model_name, kind, str(kind == "plain"))
    assert script.wait() == expected, script.said()
    assert "terminate called" not in script.said() and "could not leave" not in script.said()
    assert state(server, model_name) == "left"
    assert show_worker(server, model_name, "w0")["outcomes"] == {"applied": 3}, "the last step, too"


@pytest.mark.parametrize("kind", KINDS)
def test_a_silent_server_does_not_hold_up_the_end_for_long(
    server: RunningServer, model_name: str, scripts: Nursery, kind: str
) -> None:
    """What is under way is broken off, and the process does not end with an abort."""
    code = (
        "from pushstep.client.membership import at_exit; at_exit.EXIT_S = 1.0\n"  # five seconds otherwise
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1}); train(); optimizer.synchronize(); print('trained')\n"
        "signal.sigwait({signal.SIGUSR1})\n"
        "if kind == 'prefetch': optimizer.step()\n"
        "sys.exit(4)"
    )
    with Proxy(server.grpc) as proxy:
        script = scripts.start(BEGIN + code, proxy.address, model_name, kind, "False")
        script.wait_for("trained")
        proxy.hold("down")
        assert script.kill(signal.SIGUSR1) == 4, script.said()
        assert "terminate called" not in script.said()
