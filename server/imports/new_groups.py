"""Adds a param group with new parameters to a model, for an operator.

The version stays the same. Workers that are live know another manifest: their next push is answered `manifest_changed`, and
clients join again by themselves. Sessions of arrays go on with what they push. An attached optimizer has to have the parameters
that the model has: it stops with `manifest_mismatch` until its loop adds the same group. So a group is added under live workers
only if the operator says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

import numpy as np
import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from pushstep.proto.errors import (
    InvalidFile,
    InvalidHyperparameter,
    InvalidManifest,
    InvalidSettings,
    ManifestChanged,
    OverCapacity,
    WorkersLive,
    WrongDtype,
)
from pushstep.proto.types_pb2 import Manifest, Parameter, ParamGroup
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.hyperparameters import wire_values
from pushstep.proto.wire.layout import MAX_DIMENSIONS, Layout, with_group

from ..arenas.arena import Arenas
from ..arenas.arenas_copy import ArenasCopy
from ..coordinator.groups import Group
from ..coordinator.policies.policy import listed, require_gradients_fit
from ..coordinator.settings import LARGEST_WHOLE, Settings, Text
from ..coordinator.settings import read as read_settings
from ..models.catalog import Catalog
from ..models.edits import Edits
from ..models.model import NAMES_SHOWN, Model
from ..process import garbage
from ..process.threads import READS
from ..staging.budget import charge
from .content import read_file, require_finite
from .file_groups import manifest_of, plain
from .incoming_file import IncomingFile

MOST_PARAMETERS: Final = 1000
LONGEST_GROUP_BYTES: Final = 1 << 20
SHOWN: Final = 100


class NewParameter(Settings):
    """A new parameter: its name, shape and dtype, and one value for all of its elements, or each of them."""

    name: Annotated[str, Field(min_length=1, max_length=1000)]
    shape: Annotated[list[Annotated[int, Field(ge=0, le=LARGEST_WHOLE)]], Field(max_length=MAX_DIMENSIONS)]
    dtype: Annotated[str, Field(max_length=20)] = "float32"
    values: float | list[Any] = 0.0


class NewGroup(Settings):
    """A new param group. What is not named here is a hyperparameter of its rule."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, strict=True)

    rule: Text
    optimizer: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    params: Annotated[list[NewParameter], Field(min_length=1, max_length=MOST_PARAMETERS)]


@dataclass(frozen=True, slots=True)
class Addition:
    """A group to add: its entry of a manifest, and the values of each parameter."""

    manifest: Manifest
    values: Mapping[str, float | Tensor]


def addition_of(values: Mapping[str, Any]) -> Addition:
    """The group that JSON describes. InvalidSettings, InvalidHyperparameter, WrongDtype, NonfiniteParameter."""
    wanted = read_settings(NewGroup, values, "group", most_bytes=LONGEST_GROUP_BYTES)
    group = {name: plain(name, value) for name, value in (wanted.model_extra or {}).items()}
    manifest = Manifest()
    manifest.groups.append(
        ParamGroup(rule=wanted.rule, optimizer=wanted.optimizer, values=wire_values(group))
    )
    found: dict[str, float | Tensor] = {}
    for parameter in wanted.params:
        dtype = dtypes.BY_NAME.get(parameter.dtype)
        if dtype is None:
            raise WrongDtype(
                what=repr(parameter.name[:SHOWN]), got=parameter.dtype, expected=", ".join(dtypes.BY_NAME)
            )
        wire = dtypes.to_wire(dtype, f"parameter {parameter.name[:SHOWN]!r}")
        manifest.parameters.append(Parameter(name=parameter.name, shape=parameter.shape, dtype=wire))
        found[parameter.name] = _elements(parameter, dtype)
    return Addition(manifest, found)


def _elements(parameter: NewParameter, dtype: torch.dtype) -> float | Tensor:
    name = parameter.name
    values = parameter.values if isinstance(parameter.values, list) else [parameter.values]
    try:
        found = torch.from_numpy(np.asarray(values, dtype=np.float64)).to(dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidSettings(
            problem=f"values of {name[:SHOWN]!r}: numbers in lists of equal lengths"
        ) from error
    require_finite(name, found)
    if not isinstance(parameter.values, list):
        return parameter.values
    shape = tuple(parameter.shape)
    if tuple(found.shape) != shape:
        raise InvalidSettings(
            problem=f"values of {name[:SHOWN]!r}: of shape {tuple(found.shape)}, not {shape}"
        )
    return found


def addition_in(file: Tensor, group: str) -> Addition:
    """The group that a safetensors file has the values of. `group` is JSON. InvalidFile and what `manifest_of` raises."""
    tensors, _ = read_file(file)
    manifest = manifest_of(tensors, f"[{group}]")
    if len(manifest.groups) != 1:
        raise InvalidSettings(problem="group: one param group at a time")
    named = {name for parameter in manifest.parameters for name in (parameter.name, *parameter.aliases)}
    others = sorted(set(tensors) - named)
    if others:
        raise InvalidFile(problem=f"it has {others[0][:SHOWN]!r}, which the group does not name")
    for name, tensor in tensors.items():
        require_finite(name, tensor)
    return Addition(manifest, {parameter.name: tensors[parameter.name] for parameter in manifest.parameters})


class NewGroups:
    """Adds param groups to the models of a catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def read(self, file: IncomingFile, group: str) -> Addition:
        """The group whose values a complete file has. The file stays in memory until it is released."""
        return await READS.run(addition_in, file.content, group)

    async def plan(self, model: Model, addition: Addition, *, force: bool) -> tuple[Layout, Group]:
        """The layout with the group, and the group. Everything is checked, and nothing is made.

        InvalidManifest, InvalidHyperparameter, OverCapacity; WorkersLive if there are any, without `force`.
        """
        model.require_whole()
        live = [worker.name for worker in model.sessions.live()]
        if live and not force:
            raise WorkersLive(model=model.name, count=len(live), workers=listed(live))
        layout = await READS.run(with_group, model.layout, addition.manifest)
        if layout is model.layout:
            raise InvalidManifest(problem="the model's last group has these parameters already")
        held = next((name for name in addition.values if name in model.extras), None)
        if held is not None:
            raise InvalidManifest(problem=f"{held[:SHOWN]!r} is a buffer of the model")
        group = Group.make(addition.manifest.groups[0])
        self._require_room(model, layout)
        return layout, group

    def _require_room(self, model: Model, layout: Layout) -> None:
        push_bytes = sum(arena.elements * arena.dtype.itemsize for arena in layout.arenas)
        total_bytes = self._catalog.staging.total_bytes
        if charge(push_bytes) > total_bytes:
            raise OverCapacity(
                problem=f"one push would take {charge(push_bytes)} bytes, staging has {total_bytes}",
                setting="staging-bytes",
            )
        settings = model.coordinator.policy.settings
        require_gradients_fit(settings, model.sessions.live_count(), push_bytes, total_bytes)
        self._catalog.holding.require_room(Arenas.bytes_charged(layout) - Arenas.bytes_charged(model.layout))

    async def add(
        self, model: Model, addition: Addition, check: Callable[[], None], by: str, *, force: bool
    ) -> dict[str, Any]:
        """Add the group. `check` is called right before nothing can refuse it any more.

        ManifestChanged if another group was added meanwhile, and what `plan` raises.
        """
        base = model.layout
        layout, group = await self.plan(model, addition, force=force)
        with self._catalog.holding.promised(Arenas.bytes_charged(layout) - Arenas.bytes_charged(base)):
            extension = await READS.run(_extended, model, layout, group, addition)
        model.require_whole()
        if model.layout is not base:
            raise ManifestChanged(model=model.name)
        check()
        live = [worker.name for worker in model.sessions.live()]
        version, adopting = Edits(model).add_groups(extension, [group], by)
        await adopting
        await self._catalog.keep_groups(model)
        await model.recorder.until_safe()
        garbage.set_aside(len(model.layout.slots))
        return {
            "effective_version": version,
            "workers_live": len(live),
            "workers_told": live[:NAMES_SHOWN],
        }


def _extended(model: Model, layout: Layout, group: Group, addition: Addition) -> ArenasCopy:
    """The model's arenas with those of the new group, filled. It blocks. OutOfMemory, InvalidHyperparameter."""
    values = [each.values for each in (*model.groups.list, group)]
    extension = model.arenas.extended(layout, values)
    with model.arenas.device_stream.here():
        for slot in layout.slots[len(model.layout.slots) :]:
            given = addition.values[slot.name]
            view = extension.view(slot)
            view.fill_(given) if isinstance(given, float) else view.copy_(given)
    index = len(layout.manifest.groups) - 1
    if not extension.stays_finite(index, group.values):
        raise InvalidHyperparameter(problem="the next step would make NaN or infinity of the new parameters")
    return extension
