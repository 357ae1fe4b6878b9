"""The hooks that one model has installed, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from pushstep.proto.errors import InvalidHook, RejectedByHook, UnknownHook

from ..admission import Nonfinite
from ..groups import ParamGroups
from ..settings import read
from .catalogue import CATALOGUE
from .hook import Hook, Point, StepContext

MAX_HOOKS: Final = 100
# Limit for one hook's settings as JSON: they are kept, shown, and written into every snapshot's manifest.
MAX_SETTINGS_BYTES: Final = 16 << 10


class HookChain:
    """Adds, runs and removes hooks. At one point they run in the order of this list, as torch's do."""

    def __init__(self, on_failure: Callable[[Hook, int, Exception], None] | None = None) -> None:
        """`on_failure` gets a hook that failed after a step was decided, the version, and the error."""
        self.list: list[Hook] = []
        self._on_failure = on_failure
        self._next = 1

    def add(
        self,
        name: str,
        point: str,
        settings: Mapping[str, Any],
        groups: ParamGroups,
        model: str,
        prepend: bool = False,
    ) -> Hook:
        """Install a hook of the catalogue. InvalidHook if name, point or settings are not valid in it.

        InvalidHook also if `MAX_HOOKS` are installed. Raises what the hook's `install` raises.
        """
        if len(self.list) >= MAX_HOOKS:
            raise InvalidHook(problem=f"a model has at most {MAX_HOOKS} hooks")
        hook = made(f"{name}-{self._next}", name, point, settings)
        hook.install(groups, model)
        self._next += 1
        self.list.insert(0 if prepend else len(self.list), hook)
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
        hook.remove(groups)
        self.list.remove(hook)
        return hook

    def nonfinite(self) -> Nonfinite | None:
        """The last finite guard's choice, which overrides the setting `nonfinite`; None without a guard."""
        if not self.list:
            return None
        wishes = [wish for hook in self.list if (wish := hook.nonfinite()) is not None]
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
        found = [hook.missing_metric() for hook in self._at(Point.STEP_POST)]
        return sorted({metric for metric in found if metric is not None})

    def observers(self, point: Point) -> list[Hook]:
        """The observers at a point."""
        return [hook for hook in self._at(point) if hook.kind == "observer"] if self.list else []

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
                "state": hook.state(),
            }
            for hook in self.list
        ]

    @classmethod
    def parsed(cls, dumped: Iterable[Mapping[str, Any]], groups: ParamGroups, model: str) -> HookChain:
        """The chain that `dump` wrote, installed on `groups`. InvalidHook."""
        chain = cls()
        for entry in dumped:
            hook = made(entry["id"], entry["name"], entry["point"], entry["settings"])
            hook.install(groups, model)
            hook.load_state(entry["state"], groups)
            chain.list.append(hook)
            number = entry["id"].rpartition("-")[2]
            if number.isdigit():
                chain._next = max(chain._next, int(number) + 1)
        return chain

    def become(self, other: HookChain) -> None:
        """Take over the hooks of `other`, in place. No id of either is given again."""
        self.list[:] = other.list
        self._next = max(self._next, other._next)


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
