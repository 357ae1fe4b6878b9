"""A server, its workers, and everything that can happen to them, each as one call. What comes of it is one seed's doing."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch

from pushstep.proto.errors import PushstepError
from pushstep.proto.training_pb2 import Membership
from pushstep.server.coordinator.policies import catalogue as policies
from pushstep.server.coordinator.policies.synchronous import SyncSettings
from pushstep.server.coordinator.worker import WorkerState
from pushstep.server.devices.device import Device

from .house import House
from .intent import INTENTS_EACH, WORKERS, Intent
from .loop import SimulatedLoop
from .network import Network, Weather
from .server import LEASE_S, Busy
from .witness import SLACK_S, require
from .worker import RETRY_FOR_S, Habits, Process

Settings = dict[str, Any]
TIMEOUT_S = 4.0
# Steps that everybody takes once nothing goes wrong any more, and how long that may take: somebody may have to wait
# for a time-out, a lease and a retry first.
LAST_STEPS = 2
LAST_S = 6 * (LEASE_S + TIMEOUT_S + SLACK_S) + RETRY_FOR_S


@dataclass
class Plan:
    """What a run is drawn from."""

    workers: int = 3
    weather: Weather = field(default_factory=Weather)
    habits: list[Habits] = field(default_factory=list)
    policy: Settings = field(default_factory=lambda: {"policy": "async"})
    gate: Settings = field(default_factory=dict)
    # of a push: to be non-finite, to be skipped, to say how many samples it is over
    poison: float = 0.0
    skips: float = 0.0
    weighs: bool = False
    max_workers: int = 100
    # the event loop takes small steps itself
    takes_small: bool = True


class Simulation:
    """One run."""

    def __init__(self, chance: random.Random, plan: Plan, loop: SimulatedLoop, network: Network) -> None:
        self.plan = plan
        self.chance = chance
        self.loop = loop
        self.network = network
        device = Device() if plan.takes_small else Busy()
        self.house = House(loop, plan.max_workers, plan.gate, device)
        self.intents: list[Intent] = []
        self._drawn: dict[str, int] = {}
        self.processes: dict[str, Process] = {}
        self.replaced: list[Process] = []
        self.poison = plan.poison
        # for the end
        self._kept = 24
        self.names = [f"w{index}" for index in range(min(plan.workers, WORKERS))]
        self.switch(plan.policy)
        for name in self.names:
            self.start(name)

    def _draw(self, name: str) -> Intent | None:
        if self._drawn.get(name, 0) >= INTENTS_EACH - self._kept:
            return None
        skip = self.chance.random() < self.plan.skips
        return self.intend(
            name,
            skip=skip,
            both=self.chance.random() < 0.25,
            poison=not skip and self.chance.random() < self.poison,
            samples=self.chance.choice((0.0, 1.0, 3.0)) if self.plan.weighs else 0.0,
        )

    def intend(self, name: str, **kind: Any) -> Intent:
        """What a worker will push next."""
        number = self._drawn.get(name, 0)
        self._drawn[name] = number + 1
        self.intents.append(Intent(name, number, **kind))
        return self.intents[-1]

    # What can happen.

    def start(self, name: str, *, takeover: bool = False) -> None:
        """A process of a worker; the one before it, if it lives, is not told."""
        habits = self.plan.habits[int(name[1:])] if self.plan.habits else Habits()
        process = Process(name, self.loop, self.network, self.house, self.chance, habits, self._draw)
        if name in self.processes:
            self.replaced.append(self.processes[name])
        self.processes[name] = process
        process.start(takeover=takeover)

    def crash(self, name: str) -> None:
        """A worker's process is killed."""
        self.processes[name].crash()

    def leave(self, name: str) -> None:
        """A worker goes in order, if nothing of it is on its way."""
        if not self.processes[name].flights:
            self.processes[name].leave()

    def come_back(self, name: str) -> None:
        """A worker that is not there starts again under its name."""
        if not self.processes[name].alive:
            self.start(name)

    def visit(self, name: str) -> None:
        """Somebody new comes and goes; who is absent may be forgotten for it."""

        def leave(found: Membership | PushstepError) -> None:
            if isinstance(found, Membership):
                self.house.server.leave(found.identity)

        visitor = f"{name}-visitor-{self.chance.getrandbits(32)}"
        self.house.join(visitor, False, None, self.chance.getrandbits(63) + 1, leave)

    def partition(self, name: str) -> None:
        """Nothing passes between a worker and the server."""
        self.network.cut.add(name)

    def heal(self, name: str) -> None:
        """It does again."""
        self.network.cut.discard(name)

    def fail(self, _: str) -> None:
        """The next step fails, whoever's it is."""
        self.house.fail_step()

    def switch(self, settings: Settings) -> None:
        """Another policy, or other settings."""
        current = self.house.model.coordinator.policy.settings
        self.house.switch(policies.read(settings, current))

    def evict(self, name: str) -> None:
        """An operator fences a worker."""
        self.house.evict(name)

    def release(self, name: str) -> None:
        """An operator lets a worker out of quarantine."""
        self.house.release(name)

    # The end.

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.loop.advance(seconds)

    def finish(self) -> None:
        """Nothing goes wrong any more: everybody gets on, all is decided, and the state is what was told."""
        self.network.calm()
        self.poison = 0.0
        self.house.max_workers = self.house.model.coordinator.sessions.max_workers = (
            100  # there is room for everybody
        )
        for name in self.names:
            self.release(name)
        self._kept = 0
        for process in self.processes.values():
            process.habits.think_s = 4.0
            if process.habits.by_hand:
                process.habits.by_hand = False
                process.work()
        for forgotten in self.replaced:
            forgotten.crash()
        goals = {name: self.processes[name].done for name in self.names}
        self._until(lambda: self._have_reached(goals), LAST_S, "not everybody gets on")
        for name in self.names:
            self.processes[name].habits = Habits(window=0)
        self._let_rounds_open()
        self._until(self._have_left, LAST_S, "a push is not answered")
        self.advance(2 * RETRY_FOR_S)
        self.check()

    def _have_reached(self, goals: dict[str, int]) -> bool:
        missing = [name for name in self.names if self._drawn.get(name, 0) < INTENTS_EACH]
        if len(missing) < len(self.names):
            self._let_rounds_open()
        for name in missing:
            if not self.processes[name].alive:
                self.start(name)
                goals[name] = 0
            worker = self.house.model.coordinator.sessions.workers.get(name)
            if worker is not None and worker.quarantined:
                self.release(name)
        return all(self.processes[name].done >= goals[name] + LAST_STEPS for name in missing)

    def _let_rounds_open(self) -> None:
        """Somebody has come to an end and goes: there may be too few for a round from here on."""
        settings = self.house.model.coordinator.policy.settings
        if isinstance(settings, SyncSettings) and settings.min_workers > 1:
            self.switch({"policy": "sync", "min_workers": 1})

    def _have_left(self) -> bool:
        """Whoever has no more to push goes, and nobody waits for it."""
        for process in self.processes.values():
            if process.alive and not process.flights and process.identity is not None:
                process.leave()
        return not any(process.alive for process in self.processes.values())

    def _until(self, enough: Any, seconds: float, otherwise: str) -> None:
        require(self.loop.advance(seconds, enough), f"{otherwise} within {seconds:.0f} s")

    def check(self) -> None:
        """Nothing is left over, and the state is what the receipts say."""
        server, model = self.house.server, self.house.model
        require(not model.held._kept, "pushes are left without a verdict")
        require(not server.calls, "calls are left open")
        used_bytes = server.catalog.staging.used_bytes
        require(used_bytes == 0, f"{used_bytes} bytes are still set aside")
        model.sessions.expire(self.loop.now_s)  # of whoever joined for a process that had gone
        for worker in model.sessions.workers.values():
            require(
                not worker.undecided and not worker.receiving, f"{worker.name} still has something under way"
            )
            require(
                worker.state is not WorkerState.LIVE or worker.name not in self.names, f"{worker.name} stays"
            )
        require(model.arenas.version == model.version, "the arenas have not reached the version")
        self.check_state()
        self.house.witness.check_told()

    def check_state(self) -> None:
        """What has been stepped is what the story makes."""
        arenas, witness = self.house.model.arenas, self.house.witness
        witness.check_lr(float(self.house.model.groups.list[0].values["lr"]))
        if arenas.timeline == self.house.timeline:  # or a restore is still to be done
            states = [
                torch.cat([arenas.view(slot, state).reshape(-1) for slot in arenas.layout.slots])
                for state in ("", "sum")
            ]
            witness.check_state(arenas.version, *states)
