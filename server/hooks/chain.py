"""The hooks that one model has installed, in order, and the thread in which its observers look on."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from pushstep.proto.errors import InvalidHook, RejectedByHook, UnknownHook

from ..gate import Nonfinite
from ..groups import ParamGroups
from ..settings import read
from . import CATALOGUE
from .hook import Hook, Point, StepContext

log = logging.getLogger("pushstep.hooks")
OBSERVER_QUEUE: Final = 1000
MAX_HOOKS: Final = 100
# As JSON: they are kept, shown, and written into every snapshot's manifest.
MAX_SETTINGS_BYTES: Final = 16 << 10


class HookChain:
    """Adds, runs and removes hooks. At one point they run in the order of this list, as torch's do."""

    def __init__(self) -> None:
        self.list: list[Hook] = []
        self.dropped = 0
        self._next = 1
        self._queue: deque[tuple[Hook, Mapping[str, Any]]] = deque()
        self._wake = threading.Condition()
        self._observer: threading.Thread | None = None
        self._closed = False

    def add(
        self,
        name: str,
        point: str,
        settings: Mapping[str, Any],
        groups: ParamGroups,
        model: str,
        prepend: bool = False,
    ) -> Hook:
        """Install a hook of the catalogue. InvalidHook if name, point or settings are not in it."""
        if len(self.list) >= MAX_HOOKS:
            raise InvalidHook(problem=f"a model has at most {MAX_HOOKS} hooks")
        hook = made(f"{name}-{self._next}", name, point, settings)
        hook.install(groups, model)
        self._next += 1
        self.list.insert(0 if prepend else len(self.list), hook)
        return hook

    def find(self, hook_id: str, model: str) -> Hook:
        """An installed hook; UnknownHook otherwise."""
        for hook in self.list:
            if hook.hook_id == hook_id:
                return hook
        raise UnknownHook(model=model, hook=hook_id)

    def remove(self, hook_id: str, groups: ParamGroups, model: str) -> Hook:
        """Take a hook out."""
        hook = self.find(hook_id, model)
        hook.remove(groups)
        self.list.remove(hook)
        return hook

    def nonfinite(self) -> Nonfinite | None:
        """What the last finite guard wants instead of the model's `nonfinite` setting; None without one."""
        wishes = [wish for hook in self.list if (wish := hook.nonfinite()) is not None]
        return wishes[-1] if wishes else None

    def transforms(self) -> str:
        """The hooks that may have changed a step's factor, in words."""
        return ", ".join(h.hook_id for h in self._at(Point.STEP_PRE) if h.kind == "transform")

    def step_pre(self, context: StepContext) -> None:
        """Run transforms and guards before a step. RejectedByHook from a guard."""
        for hook in self._at(Point.STEP_PRE):
            try:
                hook.step_pre(context)
            except RejectedByHook:
                raise
            except Exception as error:
                hook.failures += 1
                raise RejectedByHook(hook=hook.hook_id, problem=repr(error)) from error

    def step_post(self, context: StepContext, groups: ParamGroups) -> None:
        """Run transforms after a step's ticket was written."""
        for hook in self._at(Point.STEP_POST):
            try:
                hook.step_post(context, groups)
            except Exception as error:  # noqa: BLE001 - the step is decided: a scheduler past its last step keeps the lr
                hook.failures += 1
                log.warning("hook %s failed at version %d: %s", hook.hook_id, context.version, error)

    def missing_metrics(self) -> list[str]:
        """Metrics that hooks wait for, and that no push has reported yet."""
        found = [hook.missing_metric() for hook in self._at(Point.STEP_POST)]
        return sorted({metric for metric in found if metric is not None})

    def tell(self, point: Point, event: Callable[[], Mapping[str, Any]]) -> None:
        """Hand an event to the observers at a point. Never waits: when they are behind, it is dropped and counted."""
        observers = [hook for hook in self._at(point) if hook.kind == "observer"]
        if not observers:
            return
        facts = event()
        with self._wake:
            for hook in observers:
                if len(self._queue) >= OBSERVER_QUEUE:
                    self.dropped += 1
                else:
                    self._queue.append((hook, facts))
            self._wake.notify()
            if self._observer is None:
                self._observer = threading.Thread(target=self._look_on, name="observers", daemon=True)
                self._observer.start()

    def _look_on(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._closed:
                    self._wake.wait()
                if not self._queue:
                    return
                hook, facts = self._queue.popleft()
            try:
                hook.observe(facts)
            except Exception:
                hook.failures += 1
                log.warning("observer %s failed", hook.hook_id, exc_info=True)

    def _at(self, point: Point) -> Iterable[Hook]:
        return [hook for hook in self.list if hook.point is point]

    def close(self) -> None:
        """Let the observers finish what is queued and end their thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._observer is not None:
            self._observer.join(timeout=5)

    def dump(self) -> list[dict[str, Any]]:
        """The chain as JSON, each hook with its state."""
        return [
            {
                "id": hook.hook_id,
                "name": hook.name,
                "point": str(hook.point),
                "settings": hook.settings.model_dump(mode="json"),
                "state": hook.state(),
            }
            for hook in self.list
        ]

    def parsed(self, dumped: Iterable[Mapping[str, Any]], groups: ParamGroups, model: str) -> list[Hook]:
        """The hooks that `dump` wrote, installed on `groups`; those of now are left alone. InvalidHook."""
        hooks = []
        for entry in dumped:
            hook = made(entry["id"], entry["name"], entry["point"], entry["settings"])
            hook.install(groups, model)
            hook.load_state(entry["state"], groups)
            hooks.append(hook)
            number = entry["id"].rpartition("-")[2]
            if number.isdigit():
                self._next = max(self._next, int(number) + 1)
        return hooks


def made(hook_id: str, name: str, point: str, settings: Mapping[str, Any]) -> Hook:
    """A hook of the catalogue, not yet installed. InvalidHook if name, point or settings are not in it."""
    kind = CATALOGUE.get(name)
    if kind is None:
        raise InvalidHook(problem=f"no hook {name!r} in the catalogue; it has {', '.join(sorted(CATALOGUE))}")
    if point not in kind.points:
        raise InvalidHook(
            problem=f"{name} can be installed at {', '.join(sorted(kind.points))}; not at {point!r}"
        )
    validated = read(kind.settings_type, settings, f"{name} settings", InvalidHook, MAX_SETTINGS_BYTES)
    return kind(hook_id, Point(point), validated)
