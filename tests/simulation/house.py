"""The server without asyncio: the judge, arenas, and what outlives a process of it.

One process follows the other. Each has an intake for what arrives and an executor for what is decided (intake.py,
executor.py: named after what they stand for in the server); a crash loses everything but the last snapshot.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pushstep.server.arenas.arena import Arenas, ArenasCopy
from pushstep.server.coordinator.admission import Admission
from pushstep.server.coordinator.admission import read as read_gate
from pushstep.server.coordinator.commits import Commits
from pushstep.server.coordinator.coordinator import Coordinator
from pushstep.server.coordinator.groups import Group, OperatorEdit, ParamGroups
from pushstep.server.coordinator.hooks.chain import HookChain
from pushstep.server.coordinator.policies import catalogue as policies
from pushstep.server.coordinator.policies.policy import PolicySettings
from pushstep.server.coordinator.sessions import Sessions
from pushstep.server.devices.device import Device
from pushstep.server.staging.budget import Budget

from .agenda import Action, Agenda
from .executor import Executor
from .intake import BODY_BYTES, Intake
from .intent import LAYOUT
from .network import Network
from .story import FIRST_LR, Books
from .witness import Witness

LEASE_S = 10.0
STAGING_BYTES = 12 * BODY_BYTES
UID = b"uid"
# Does a piece of the server's work, of a kind, when it gets round to it.
Work = Callable[[str, Action], None]


@dataclass
class Snapshot:
    """All that outlives the server, and the witness's books of then."""

    facts: dict[str, Any]
    copy: ArenasCopy
    books: Books


class House:
    """One server process after the other, each with what the last one left."""

    def __init__(
        self,
        agenda: Agenda,
        network: Network,
        work: Work,
        max_workers: int,
        admission: dict[str, Any],
    ) -> None:
        self.agenda = agenda
        self.network = network
        self.work = work
        self.max_workers = max_workers
        self.witness = Witness(agenda)
        self.timeline = 1
        self.admission = admission
        self._start({"policy": "async"})
        self.arenas.timeline = 1
        self.snapshot: Snapshot | None = None
        self.take_snapshot()

    # Processes.

    def _start(self, policy: dict[str, Any]) -> None:
        groups = ParamGroups(Group.make(group) for group in LAYOUT.manifest.groups)
        for group in groups.list:
            group.values["lr"] = FIRST_LR
        self.commits = Commits("m", self.timeline, groups, HookChain())
        self.coordinator = Coordinator(UID, self.commits, Sessions(LEASE_S, self.max_workers, "m"))
        self.coordinator.admission.settings = read_gate(self.admission, self.coordinator.admission.settings)
        self.arenas = Arenas(LAYOUT, Device())
        self.budget = Budget(STAGING_BYTES)
        self.intake = Intake(self)
        self.executor = Executor(self)
        self.coordinator.switch(policies.read(policy), self.agenda.now_s)
        self.witness.attend(self.coordinator)

    def facts(self) -> dict[str, Any]:
        """What a snapshot's manifest holds."""
        facts = {
            "version": self.commits.version,
            "timeline": self.timeline,
            "policy": self.coordinator.policy.settings.model_dump(mode="json"),
            "gate": self.coordinator.admission.dump(),
            "groups": self.commits.groups.dump(),
            "workers": self.coordinator.sessions.dump(),
            "forgotten_epoch": self.coordinator.sessions.forgotten_epoch,
        }
        read: dict[str, Any] = json.loads(json.dumps(facts))
        return read

    def stop_and_start(self, *, orderly: bool) -> None:
        """Another process: with everything, or with what the last snapshot held, on a new timeline."""
        if orderly:
            self.executor.run_jobs()
            copy = replace(self.arenas.copy(), lineage=tuple(self.commits.lineage))
            self.snapshot = Snapshot(self.facts(), copy, self.witness.books.copy())
        kept = self.snapshot
        if kept is None:
            return
        self.timeline += not orderly
        self.intake.close()
        self.executor.close()
        self._start(kept.facts["policy"])
        self.commits.groups.list[:] = ParamGroups.parse(kept.facts["groups"]).list
        self.commits.version, self.commits.lineage = kept.copy.version, list(kept.copy.lineage)
        self.coordinator.sessions.parse(
            kept.facts["workers"], self.agenda.now_s, kept.facts["forgotten_epoch"]
        )
        self.coordinator.admission = Admission.parsed(kept.facts["gate"])
        if not orderly:
            self.commits.go_back(kept.copy.lineage_here, self.timeline)
            self.coordinator.sessions.close_epochs()
            self.witness.fenced.clear()  # what it held of that may be lost
        self.witness.goes_back(kept.books, self.timeline)
        self.arenas.load(kept.copy, self.timeline)

    # What an operator does.

    def take_snapshot(self) -> None:
        """Behind everything that has been decided."""
        facts, books, lineage = self.facts(), self.witness.books.copy(), tuple(self.commits.lineage)

        def keep() -> None:
            self.snapshot = Snapshot(facts, replace(self.arenas.copy(), lineage=lineage), books)

        self.executor.submit(keep)

    def restore(self) -> None:
        """Bring the last snapshot back on a new timeline while workers are at work."""
        kept = self.snapshot
        if kept is None:
            return
        self.timeline += 1
        self.commits.groups.list[:] = ParamGroups.parse(kept.facts["groups"]).list
        self.coordinator.admission = Admission.parsed(kept.facts["gate"])
        self.witness.goes_back(kept.books, self.timeline)
        settings = policies.read(kept.facts["policy"])
        timeline = self.timeline
        decisions = self.coordinator.restored(kept.copy.lineage_here, timeline, settings, self.agenda.now_s)
        self.executor.apply(decisions)
        self.executor.submit(lambda: self.arenas.load(kept.copy, timeline))

    def switch(self, settings: PolicySettings) -> None:
        """Another policy, or other settings of this one."""
        self.executor.apply(self.coordinator.switch(settings, self.agenda.now_s))

    def patch(self, lr: float, *, hold: bool) -> None:
        """An operator's lr, held against the workers' schedulers or not."""
        self.commits.groups.patch(0, OperatorEdit({"lr": lr}, hold), "m")
        self.witness.patched(lr, held=hold)
