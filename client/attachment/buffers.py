"""Extras: the buffers and frozen values of a module, beside the parameters that are stepped.

Attach pulls them like parameters. A script that is started again then continues with the trained statistics, and every
worker has the same frozen layers. The lead worker sends extras that have changed, every EVERY_STEPS steps and at the end,
so that exports and snapshots hold them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from pushstep.proto.errors import ManifestMismatch, PushstepError
from pushstep.proto.types_pb2 import Manifest
from pushstep.proto.wire import dtypes
from pushstep.proto.wire.names import check_parameter_name

from ..membership.membership import Membership
from ..warn import warn
from .local_edits import LocalEdits, same_bits
from .names import CleanNames
from .overwritten import Overwritten

EVERY_STEPS: Final = 100
# An extra of up to this size is compared whole. Of a larger one each check compares some cache lines.
WHOLE_BYTES: Final = 1 << 20
_EXTRA_STATE: Final = "_extra_state"
# The dtypes that a safetensors file can hold.
_DTYPES: Final = frozenset(
    (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.uint64, torch.uint32, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2),
    )
)


class Extras:
    """Watches one module's extras for changes, and keeps the values that attach overwrote. Does nothing without a module."""

    def __init__(self, membership: Membership, module: nn.Module | None) -> None:
        self._membership = membership
        self._module = module
        self._clean = None if module is None else CleanNames(module)
        self._stepped: Collection[str] = ()
        self._names: list[str] = []
        self._edits = LocalEdits()
        self._overwritten = Overwritten()
        self._version = 0
        self._steps = 0

    def begin(self, stepped: Collection[str]) -> dict[str, Tensor]:
        """Return all extras, to create a model with; `stepped`: the names of the model's parameters.

        Warns about tensors that no file can hold. Raises InvalidManifest for a name that no file can hold.
        """
        self._stepped = stepped
        found = self._found()
        left_out = {name: why for name, value in found.items() if (why := _why_not(value))}
        for name in found:
            check_parameter_name(name)
        if left_out:
            reasons = ", ".join(f"{name!r} ({why})" for name, why in left_out.items())
            warn(f"exports and other workers will lack these buffers of the module: {reasons}")
        return {name: value for name, value in found.items() if name not in left_out}

    def exclude(self, added: Manifest) -> None:
        """Leave out the added parameters, which are stepped from now on."""
        names = {name for parameter in added.parameters for name in (parameter.name, *parameter.aliases)}
        self._stepped = {*self._stepped, *names}
        self._names = ["" if name in names else name for name in self._names]

    def _found(self) -> dict[str, Tensor]:
        if self._module is None or self._clean is None:
            return {}
        named = {self._clean.of(key): value for key, value in self._module.state_dict().items()}
        return {
            name: value
            for name, value in named.items()
            if isinstance(value, Tensor) and name not in self._stepped
        }

    def _here(self) -> dict[str, Tensor]:
        return {name: value for name, value in self._found().items() if not _why_not(value)}

    # Pulling.

    def join(self, version: int) -> None:
        """Pull the model's extras into the module, if it has any (`version` > 0). The lead then sends those that the model lacks.

        Raises ManifestMismatch for a frozen value of another shape than the server's.
        """
        held: Mapping[str, Tensor] = {}
        if version and self._module is not None:
            version, held = self._membership.pull_extras()
            self._take(held)
        self._version = version
        self._settle()
        if self._membership.member().lead:
            self._send({name: value for name, value in self._here().items() if name not in held})

    def created(self, version: int) -> None:
        """Note that the model was created with the local extras, as `version`."""
        self._version = version
        self._settle()

    def rejoin(self, version: int) -> None:
        """After a restore, pull the restored extras, unless the local ones are of that version and unchanged."""
        if version and self._module is not None and (version != self._version or self._changed()):
            self._version, held = self._membership.pull_extras()
            self._take(held)
            self._settle()

    def _take(self, held: Mapping[str, Tensor]) -> None:
        here = {name: value for name, value in self._here().items() if name in held}
        other = [
            name for name, value in here.items() if value.shape != held[name].shape and not _is_state(name)
        ]
        self._check_frozen([name for name in other if name in self._frozen()], here, held)
        other += [
            name for name, value in here.items() if 0 in value.stride() and not same_bits(value, held[name])
        ]
        if other:
            warn(
                "these buffers keep their local values, since they are expanded or have another shape than the server's: "
                f"{', '.join(dict.fromkeys(other))}"
            )
        for name, value in here.items():
            if name not in other:
                self._overwritten.keep(name, value, held[name])
        self._write({name: held[name] for name in here if name in self._overwritten.values})

    def _frozen(self) -> set[str]:
        if self._module is None or self._clean is None:
            return set()
        return {self._clean.of(key) for key, _ in self._module.named_parameters(remove_duplicate=False)}

    def _check_frozen(
        self, names: Collection[str], here: Mapping[str, Tensor], held: Mapping[str, Tensor]
    ) -> None:
        if names:
            differences = "; ".join(
                f"frozen {name!r}: the server has {tuple(held[name].shape)}, this worker {tuple(here[name].shape)}"
                for name in names
            )
            raise ManifestMismatch(model=self._membership.model, differences=differences)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        here = self._here()
        for name, value in values.items():
            if _is_state(name):
                self._set_extra_state(name, value)
            elif name in here:
                here[name].copy_(value)

    def _set_extra_state(self, name: str, value: Tensor) -> None:
        if self._module is None or self._clean is None:
            return
        for path, part in self._module.named_modules(remove_duplicate=False):
            if self._clean.of(f"{path}.{_EXTRA_STATE}" if path else _EXTRA_STATE) == name:
                part.set_extra_state(value)

    def put_back(self) -> None:
        """Restore the values that attach overwrote, except in tensors that were written to since."""
        self._changed()
        self.undo()

    def undo(self) -> None:
        """Restore all values that attach overwrote."""
        self._write(self._overwritten.values)
        self._overwritten.forget()

    # Sending.

    def stepped(self) -> None:
        """Count a step; every EVERY_STEPS steps, send what has changed."""
        if self._overwritten.values:
            self._overwritten.forget()
        self._steps += 1
        if self._steps % EVERY_STEPS == 0:
            self.send_if_possible()

    def send_if_possible(self) -> None:
        """Send what has changed, and ignore a PushstepError: the next step meets the same problem and raises it."""
        with contextlib.suppress(PushstepError):
            self.send()

    def send(self) -> None:
        """Send what has changed since it was pulled or sent, if this worker leads."""
        if self._module is not None and self._membership.member().lead:
            self._send(self._changed())

    def _send(self, values: Mapping[str, Tensor]) -> None:
        here = self._here()
        gone = [name for name in self._names if name and name not in here]
        if values or gone:
            self._version = self._membership.upload_extras(here if gone else values, are_all=bool(gone))
            self._settle()

    def _changed(self) -> dict[str, Tensor]:
        here = self._here()
        for place, name in enumerate(self._names):
            if name in here:
                self._edits.replace(place, here[name])  # a script may have replaced a buffer
        seen = self._edits.look()
        self._overwritten.drop(self._names[place] for place in seen.written)
        other = {*seen.changed, *seen.doubtful}
        same = {name for place, name in enumerate(self._names) if place not in other}
        return {name: value for name, value in here.items() if name not in same}

    def _settle(self) -> None:
        here = self._here()
        self._names = list(here)
        self._edits.watch(list(here.values()), WHOLE_BYTES)
        self._edits.settle()


def _is_state(name: str) -> bool:
    return name.rpartition(".")[2] == _EXTRA_STATE


def _why_not(value: Tensor) -> str:
    """Return the reason why a tensor is not sent; "" if it is sent."""
    if value.layout is not torch.strided:
        return str(value.layout).removeprefix("torch.")
    if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
        return type(value).__name__
    if value.is_meta:
        return "on the meta device"
    if value.is_inference():
        return "made in inference mode"
    return "" if value.dtype in _DTYPES else dtypes.name_of(value.dtype)
