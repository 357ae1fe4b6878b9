"""The hooks that one model has installed, in order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from pushstep.proto.errors import InvalidHook, PushstepError, RejectedByHook, UnknownHook

from ..gate import Nonfinite
from ..groups import ParamGroups
from ..settings import read
from .catalogue import BUILT_IN, CATALOGUE
from .hook import Hook, Point, StepContext

MAX_HOOKS: Final = 100
# Limit for one hook's settings as JSON: they are kept, shown, and written into every snapshot's manifest.
MAX_SETTINGS_BYTES: Final = 16 << 10
# Limit for one hook's state as JSON, of hooks that are not of this house.
MAX_STATE_BYTES: Final = 64 << 10
T = TypeVar("T")


class HookChain:
    """Adds, runs and removes hooks. At one point they run in the order of this list, as torch's do."""

    def __init__(self, on_failure: Callable[[Hook, int, Exception], None] | None = None) -> None:
        """`on_failure` gets a hook that failed after a step was decided, the version, and the error."""
        self.list: list[Hook] = []
        self._on_failure = on_failure
        self._next = 1
        # the last good state of hooks that are not of this house, by id
        self._states: dict[str, dict[str, Any]] = {}

    def add(
        self,
        name: str,
        point: str,
        settings: Mapping[str, Any],
        groups: ParamGroups,
        model: str,
        prepend: bool = False,
        hook_id: str | None = None,
    ) -> Hook:
        """Install a hook of the catalogue. InvalidHook if name, point or settings are not valid in it.

        hook_id: one that was reserved.

        InvalidHook also if `MAX_HOOKS` are installed. Raises what the hook's `install` raises.
        """
        if len(self.list) >= MAX_HOOKS:
            raise InvalidHook(problem=f"a model has at most {MAX_HOOKS} hooks")
        hook = made(hook_id or f"{name}-{self._next}", name, point, settings)
        self._guarded(hook, lambda: hook.install(groups, model))
        if hook_id is None:
            self._next += 1
        self.list.insert(0 if prepend else len(self.list), hook)
        return hook

    def reserve(self, name: str) -> str:
        """An id for a hook that is about to be installed."""
        self._next += 1
        return f"{name}-{self._next - 1}"

    def change(
        self,
        hook_id: str,
        changes: Mapping[str, Any],
        position: int | None,
        groups: ParamGroups,
        model: str,
    ) -> Hook:
        """Change some settings of a hook, and its place in the order. UnknownHook, InvalidHook, what `install` raises.

        All changes are made, or none.
        """
        before = self.find(hook_id, model)
        at = self.list.index(before) if position is None else position
        if at >= len(self.list):
            raise InvalidHook(problem=f"there is no position {at} among {len(self.list)} hooks")
        hook = before
        if changes:
            hook = made(hook_id, before.name, before.point, before.merged(changes))
            self._guarded(hook, lambda: hook.succeed(before, groups, model))
        self.list.remove(before)
        self.list.insert(at, hook)
        return hook

    def find(self, hook_id: str, model: str) -> Hook:
        """An installed hook by its id. UnknownHook if there is none."""
        for hook in self.list:
            if hook.hook_id == hook_id:
                return hook
        raise UnknownHook(model=model, hook=hook_id)

    def remove(self, hook_id: str, groups: ParamGroups, model: str) -> Hook:
        """Remove an installed hook. UnknownHook."""
        hook = self.find(hook_id, model)
        self._asked(hook, lambda: hook.remove(groups), None)
        self.list.remove(hook)
        self._states.pop(hook_id, None)
        return hook

    def nonfinite(self) -> Nonfinite | None:
        """The last finite guard's choice, which overrides the setting `nonfinite`; None without a guard."""
        if not self.list:
            return None
        found = [self._asked(hook, hook.nonfinite, None) for hook in self.list]
        wishes = [wish for wish in found if wish is not None]
        return wishes[-1] if wishes else None

    def transforms(self) -> str:
        """The hooks that may have changed a step's factor, in words."""
        return ", ".join(h.hook_id for h in self._at(Point.STEP_PRE) if h.kind == "transform")

    def step_pre(self, context: StepContext) -> None:
        """Run transforms and guards before a step. RejectedByHook if a guard refuses it or a hook fails."""
        for hook in self._at(Point.STEP_PRE) if self.list else ():
            try:
                hook.step_pre(context)
            except RejectedByHook:
                raise
            except Exception as error:
                hook.failures += 1
                raise RejectedByHook(hook=hook.hook_id, problem=repr(error)) from error

    def step_post(self, context: StepContext, groups: ParamGroups) -> None:
        """Run transforms after a step's ticket was written."""
        for hook in self._at(Point.STEP_POST) if self.list else ():
            try:
                hook.step_post(context, groups)
            except Exception as error:  # noqa: BLE001 - the step is decided: a scheduler past its last step keeps the lr
                hook.failures += 1
                if self._on_failure is not None:
                    self._on_failure(hook, context.version, error)

    def missing_metrics(self) -> list[str]:
        """The names of metrics that hooks wait for and no push has reported yet."""
        if not self.list:
            return []
        found = [self._asked(hook, hook.missing_metric, None) for hook in self._at(Point.STEP_POST)]
        return sorted({metric for metric in found if metric is not None})

    def observers(self, point: Point) -> list[Hook]:
        """The observers at a point."""
        return [hook for hook in self._at(point) if hook.kind == "observer"] if self.list else []

    def averages(self) -> dict[str, Sequence[int]]:
        """The hooks that keep averages of parameters, and of which groups."""
        return {hook.hook_id: groups for hook in self.list if (groups := hook.averages())}

    def _guarded(self, hook: Hook, job: Callable[[], None]) -> None:
        """Run what a hook does when it is installed. InvalidHook if it fails otherwise than by a named error."""
        try:
            job()
            if type(hook) not in BUILT_IN:
                self._states[hook.hook_id] = _checked(hook.state())
        except PushstepError:
            raise
        except Exception as error:
            raise InvalidHook(problem=f"{hook.name}: {error!r}") from error

    def _asked(self, hook: Hook, question: Callable[[], T], otherwise: T) -> T:
        """A hook's answer. One that fails is counted."""
        try:
            return question()
        except Exception:  # noqa: BLE001 - nobody's push may wait for ever because a hook of another house fails
            hook.failures += 1
            return otherwise

    def _at(self, point: Point) -> Iterable[Hook]:
        return [hook for hook in self.list if hook.point is point]

    def dump(self) -> list[dict[str, Any]]:
        """The chain as JSON, each hook with its state."""
        return [
            {
                "id": hook.hook_id,
                "name": hook.name,
                "point": str(hook.point),
                "settings": hook.settings.model_dump(mode="json"),
                "state": self._state_of(hook),
            }
            for hook in self.list
        ]

    def _state_of(self, hook: Hook) -> dict[str, Any]:
        """A hook's state. Of one of another house that fails, or is no JSON, its last one."""
        if type(hook) in BUILT_IN:
            return hook.state()
        state = self._asked(hook, lambda: _checked(hook.state()), None)
        if state is None:
            return self._states.get(hook.hook_id, {})
        self._states[hook.hook_id] = state
        return state

    @classmethod
    def parsed(cls, dumped: Iterable[Mapping[str, Any]], groups: ParamGroups, model: str) -> HookChain:
        """The chain that `dump` wrote, installed on `groups`. InvalidHook."""
        chain = cls()
        for entry in dumped:
            hook = made(entry["id"], entry["name"], entry["point"], entry["settings"])
            hook.resume(entry["state"], groups, model)
            chain.list.append(hook)
            number = entry["id"].rpartition("-")[2]
            if number.isdigit():
                chain._next = max(chain._next, int(number) + 1)
        return chain

    def become(self, other: HookChain) -> None:
        """Take over the hooks of `other`, in place. No id of either is given again."""
        self.list[:] = other.list
        self._next = max(self._next, other._next)


def _checked(state: dict[str, Any]) -> dict[str, Any]:
    """A state as snapshots hold it. ValueError or TypeError if it is no JSON object, or too long."""
    text = json.dumps(state, allow_nan=False)
    if not isinstance(state, dict) or len(text) > MAX_STATE_BYTES:
        raise ValueError(f"a hook's state is a JSON object of at most {MAX_STATE_BYTES} bytes")
    return dict(json.loads(text))


def made(hook_id: str, name: str, point: str, settings: Mapping[str, Any]) -> Hook:
    """Make a hook of the catalogue. InvalidHook if name, point or settings are not valid in it."""
    kind = CATALOGUE.get(name)
    if kind is None:
        raise InvalidHook(problem=f"no hook {name!r} in the catalogue; it has {', '.join(sorted(CATALOGUE))}")
    if point not in kind.points:
        raise InvalidHook(
            problem=f"{name} can be installed at {', '.join(sorted(kind.points))}; not at {point!r}"
        )
    validated = read(kind.settings_type, settings, f"{name} settings", InvalidHook, MAX_SETTINGS_BYTES)
    return kind(hook_id, Point(point), validated)
