"""Brings in the hooks that are not pure: the observers of this house, and what other packages install.

A package installs a hook by an entry point of the group `pushstep.hooks`, whose object is a subclass of `Hook`. It runs in
the server's process, with all of its rights. One that cannot be loaded is named in the log, and the server starts without it.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Final

from ..coordinator.hooks.catalogue import BUILT_IN, CATALOGUE
from ..coordinator.hooks.hook import Hook, Point
from .span import Span
from .tensorboard import TensorBoard
from .webhook import Webhook

log = logging.getLogger("pushstep.hooks")
GROUP: Final = "pushstep.hooks"
KINDS: Final = ("transform", "guard", "observer")
OBSERVERS: Final[tuple[type[Hook], ...]] = (Span, TensorBoard, Webhook)


@cache
def register() -> None:
    """Enter all of them in the catalogue, once per process: to look at every installed package takes some 20 ms."""
    for kind in OBSERVERS:
        CATALOGUE.setdefault(kind.name, kind)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        if entry.name not in CATALOGUE:
            _enter(entry)
        elif CATALOGUE[entry.name] in (*BUILT_IN, *OBSERVERS):
            log.error(
                "the hook %s of %s is not installed: pushstep has one of that name", entry.name, _of(entry)
            )


def _enter(entry: EntryPoint) -> None:
    try:
        kind = entry.load()
        if not (isinstance(kind, type) and issubclass(kind, Hook)):
            raise TypeError(f"{entry.value} is no subclass of pushstep.server.coordinator.hooks.hook.Hook")
        if kind.name != entry.name or kind.kind not in KINDS or not set(kind.points) <= set(Point):
            raise TypeError(f"{entry.value}: its name, kind or points are not those of a hook {entry.name!r}")
        kind.settings_type.model_json_schema()
    except Exception as error:  # noqa: BLE001 - whatever another package does, the models are served
        log.error("the hook %s of %s cannot be loaded: %r", entry.name, _of(entry), error)
        return
    CATALOGUE[entry.name] = kind
    log.info("hook %s of %s", entry.name, _of(entry))


def _of(entry: EntryPoint) -> str:
    return "an unknown package" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
