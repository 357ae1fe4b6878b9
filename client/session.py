"""A session: one worker's connection to one model, and everything that it may ask of it.

A session is a participant with what a user holds beside it: parameters by name, as numpy arrays; the optimizer that
was attached; and an end, after which the model goes on without this worker.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import numpy as np
import torch
from torch import Tensor, nn

from pushstep.optim.state_dict import tensor_of
from pushstep.proto import training_pb2 as pb
from pushstep.proto.errors import InvalidSettings, NotAttached, RowOutOfRange, UnsupportedModule, WrongDtype
from pushstep.proto.layout import Layout, Slot

from . import caller
from .at_exit import close_at_exit
from .compression import Wire
from .dial import dial
from .gradients import Rows, as_array, as_gradient
from .manifest import of_arrays
from .mirror import Array
from .options import MIN_TIMEOUT_S, check_options, default_worker, warn_of_environment
from .originals import as_optimizers
from .participant import Participant, wire_enum
from .policy import Policy, for_workers
from .ranks import Ranks
from .receipt import Receipt
from .remote_optimizer import Edits, RemoteOptimizer, named_after
from .shared_memory import is_same_host
from .shield import shield
from .transport import Transport

log = logging.getLogger("pushstep.client")


@shield
def connect(
    address: str,
    *,
    model: str,
    worker: str | None = None,
    wire: Wire = None,
    top_k: float | None = None,
    timeout_s: float = 30.0,
    retry_for_s: float = 300.0,
    wait_s: float = 0.0,
    shared_memory: bool = True,
    takeover: bool = False,
    on_reject: Literal["raise", "skip"] = "raise",
    on_restore: Literal["continue", "raise"] = "continue",
) -> Session:
    """A session with the server at "HOST:PORT" or "unix:/path".

    `wire`: the dtype of what travels (None: each parameter's own), or its name, or a pair (pushes, pulls); "int8" is for
    pushes, pulls are then bfloat16. `top_k`: the fraction of each dense gradient's elements to push, the largest ones;
    what a push leaves out, in int8 or by top_k, is added to the next gradient. `timeout_s` is how
    long an attempt may stand still; `retry_for_s` is how long a silent server is asked again, but for the time in which
    bytes move; `wait_s` how long to wait here for a server that is not there yet.
    Gradients and parameters of a server on this host go through shared memory, unless `shared_memory` is False; those
    of an attached optimizer on the server's GPU through memory of that GPU.
    `on_reject="skip"` warns where a rejected push would raise. Raises ServerUnavailable when no server answers.
    """
    name = worker if worker is not None else default_worker()
    check_options(
        model,
        name,
        wire,
        top_k,
        choices={
            "on_reject": (on_reject, ("raise", "skip")),
            "on_restore": (on_restore, ("continue", "raise")),
        },
        seconds={
            "timeout_s": (timeout_s, MIN_TIMEOUT_S),
            "retry_for_s": (retry_for_s, 0.0),
            "wait_s": (wait_s, 0.0),
        },
    )
    warn_of_environment()
    transport, found = dial(address, timeout_s, wait_s)
    try:
        sharing = shared_memory and bool(found.memory_path) and is_same_host(address)
        return Session(
            transport,
            model,
            name,
            wire,
            top_k,
            retry_for_s,
            takeover,
            on_reject,
            on_restore,
            shared_memory=sharing,
        )
    except BaseException:
        transport.close()
        raise


class Session(Participant):
    """One worker's session; see `connect`. Not for use by several threads at once."""

    def __init__(
        self,
        transport: Transport,
        model: str,
        worker: str,
        wire: Wire,
        top_k: float | None,
        retry_for_s: float,
        takeover: bool,
        on_reject: str,
        on_restore: str,
        *,
        shared_memory: bool = False,
    ) -> None:
        super().__init__(
            transport,
            model,
            worker,
            wire,
            top_k,
            retry_for_s,
            takeover,
            on_reject,
            on_restore,
            shared_memory=shared_memory,
        )
        self._exiting = False
        close_at_exit(self)
        self._before_close: list[Callable[[], None]] = []
        self._attached: RemoteOptimizer | None = None
        self.ranks = Ranks(())

    # Joining.

    @shield
    def attach(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        module: nn.Module | None = None,
        names: Sequence[str] | Mapping[Tensor, str] | None = None,
        policy: Policy | None = None,
        *,
        workers: int | None = None,
        overlap: bool = False,
        prefetch: bool = False,
        edits: Edits = "sample",
    ) -> RemoteOptimizer:
        """An optimizer whose steps the server takes, in place of torch's or pushstep.optim's Adadelta or Adagrad.

        The first worker to attach creates the model from its parameters' values and its optimizers' states; later
        ones take the server's values and hyperparameters. Names come from `module`, else `names`, else the
        optimizer's own. A list of optimizers makes one model. `policy`: of the model, if this creates it; see `create`.
        What DistributedDataParallel does with N ranks is policy="sync", workers=N, without the wrapper.

        `overlap`: gradients leave while backward still runs; `step()` sends them again if they were changed since.
        `prefetch`: `step()` does not wait for its answer, the next `step()` takes it; so each gradient is computed
        on the parameters of one step earlier, as `staleness` in its receipt says. It always sends frames. With shared
        memory there is nothing for `overlap` to send.

        `edits`: what to do when parameters are written to here between steps, by clamping, a renorm, `.data`. "sample" refuses
        the next step by LocalParameterEdit: each write that torch counts and each changed address is found, and of others those
        that a look at some of the memory shows, which is all that touch whole tensors. "check" compares all of it. "upload"
        compares all of it, and sends what was changed as a version of its own.

        A session steps one model: a second attach is refused. An attach that fails leaves nothing behind.
        """
        self._check_usable()
        self._check_free()
        if overlap and self.compression.owes:
            # what is owed is settled push by push; an early one may yet be withdrawn
            raise InvalidSettings(problem="overlap=True goes with exact wires, not with int8 or top_k")
        optimizers = as_optimizers(optimizer)
        if any(isinstance(each, RemoteOptimizer) for each in optimizers):
            raise UnsupportedModule(
                problem="RemoteOptimizer is not a rule that the server steps: this one is attached already"
            )
        single = isinstance(optimizer, torch.optim.Optimizer)
        asked = for_workers(policy, workers)
        ranks = Ranks([p for each in optimizers for group in each.param_groups for p in group["params"]])
        ranks.refuse_wrapper()
        with contextlib.ExitStack() as undo:
            undo.callback(setattr, self, "_attached", None)
            self.ranks = ranks
            made = self._attached = named_after(optimizers)(
                self,
                optimizers,
                module,
                names,
                asked,
                single=single,
                overlap=overlap,
                prefetch=prefetch,
                edits=edits,
                undo=undo,
            )
            ranks.say(self.member().policy, chosen=asked is not None)
            shield.check()  # while it can be undone: who is interrupted gets no optimizer to hold
            undo.pop_all()
        return made

    def _check_free(self) -> None:
        if self._attached is not None:
            raise UnsupportedModule(
                problem=f"this session already steps model {self.model!r}: attach a list of optimizers, or connect again, with "
                "another model= for another network; close() this one first if it is to be the same worker of the same model"
            )

    @shield
    def create(
        self,
        parameters: Mapping[str, Array | Tensor],
        groups: Sequence[Mapping[str, Any]] | None = None,
        policy: Policy | None = None,
        workers: int | None = None,
    ) -> None:
        """Create the model from arrays by name, or join it if it exists (its values stand).

        Each group is {"rule": "adadelta" or "adagrad", "params": [names], and hyperparameters}; None puts all
        parameters into one Adadelta group. `policy` says when pushes are applied: "async", "bounded", "sync", or a
        mapping with the settings that PATCH /v1/models/{m}/policy takes. `workers`: how many a round of "sync" waits for.
        """
        self._check_usable()
        self._check_free()
        asked = for_workers(policy, workers)
        manifest, values = of_arrays(parameters, groups)
        self.join_or_create(
            manifest, lambda layout: {(slot, ""): values[slot.name] for slot in layout.slots}, policy=asked
        )
        self._manifest = (
            None  # arrays go by name: joining again, the session takes the model as it has become
        )

    # Pushing.

    @shield
    def push(
        self, grads: Mapping[str, Any], metrics: Mapping[str, float] | None = None, samples: float = 0
    ) -> Receipt:
        """Hand gradients in by name: arrays, tensors, or (ids, rows) pairs. Returns when they are applied.

        `samples`: how many the gradients are over, which is their weight in a round; 0 counts as 1.
        """
        commit = self.commit(metrics, samples=samples)
        receipt, _ = self.step(self._named(grads), self._mirror.at, commit, pull=False)
        return receipt

    @shield
    def exchange(
        self, grads: Mapping[str, Any], metrics: Mapping[str, float] | None = None, samples: float = 0
    ) -> tuple[Receipt, dict[str, Array]]:
        """Push and pull in one round trip: the receipt, and every parameter at its version or a newer one."""
        commit = self.commit(metrics, samples=samples)
        receipt, pulled = self.step(self._named(grads), self._mirror.at, commit, pull=True)
        if pulled is None:
            return receipt, self.pull()
        self._mirror.take(pulled)
        return receipt, self._arrays()

    def _named(self, grads: Mapping[str, Any]) -> dict[Slot, Tensor | Rows]:
        layout = self.member().layout
        found: dict[Slot, Tensor | Rows] = {}
        for name, gradient in grads.items():
            slot = layout.slot(name, self.model)
            if slot in found:
                raise UnsupportedModule(
                    problem=f"{name!r} is another name of {slot.name!r}, of which a push has one gradient: add them up"
                )
            found[slot] = as_gradient(gradient, slot)
        return found

    # Pulling.

    @shield
    def pull(self) -> dict[str, Array]:
        """Every parameter by name at the newest version. A session that only pulls is a reader and never joins."""
        self._check_usable()
        have = self._mirror.at
        request = pb.PullRequest(
            model=self.model,
            options=self._pull_options(have),
            timeline=have[0] if have else 0,
            manifest_hash=self._mirror.layout.manifest_hash if self._mirror.layout is not None else 0,
        )
        self._mirror.take(self._read(lambda: self._transport.pull(request, self._mirror.layout)))
        return self._arrays()

    @shield
    def pull_rows(self, name: str, ids: Any) -> Array:
        """Some rows of one parameter, in the order of `ids`, at one version."""
        self._check_usable()
        layout = self._layout_for_reading()
        slot = layout.slot(name, self.model)
        request = pb.PullRowsRequest(
            model=self.model,
            parameter=slot.name,
            ids=_row_ids(ids, slot),
            dtype=wire_enum(self.pull_wire),
        )
        pulled = self._read(lambda: self._transport.pull_rows(request, layout))
        return as_array(next(pulled.rows())[2])

    def _layout_for_reading(self) -> Layout:
        if self._member is not None:
            return self._member.layout
        if self._mirror.layout is None:
            self.pull()
        if self._mirror.layout is None:
            raise NotAttached(problem="nothing was pulled")
        return self._mirror.layout

    def _arrays(self) -> dict[str, Array]:
        arrays = self._mirror.arrays()
        if arrays is None:
            # a group was added, which makes no version: what this copy lacks did not come as a change
            self._mirror.forget()
            return self.pull()
        return arrays

    @property
    def version(self) -> int | None:
        """The version of the last pull."""
        return None if self._mirror.at is None else self._mirror.at[1]

    # Uploading.

    @shield
    def upload(self, values: Mapping[str, Any] | None = None) -> int:
        """Send parameter values as a version of their own; the version. None sends what an attached optimizer holds."""
        if values is None:
            if self._attached is None:
                raise NotAttached(problem="no optimizer is attached: pass values={name: array}")
            return self._attached.upload()
        member = self.member()
        slots = {member.layout.slot(name, self.model): tensor_of(v) for name, v in values.items()}
        for slot, value in slots.items():
            as_gradient(value, slot)
        return self.upload_values({(slot, ""): value.to(slot.dtype) for slot, value in slots.items()})

    # Life.

    def before_close(self, task: Callable[[], None]) -> None:
        """Have `task` run when the session is closed, while it can still talk."""
        self._before_close.append(task)

    def not_before_close(self, task: Callable[[], None]) -> None:
        """Not, after all."""
        self._before_close.remove(task)

    @shield
    def close(self) -> None:
        """Leave the model and close the connection. Closing twice, or in a forked child, does nothing."""
        if self._closed or os.getpid() != self._pid:
            return
        self._heartbeat.stop()
        self._retry.give_up()
        try:
            if self._member is not None:
                for task in self._before_close:
                    task()
                edits = {} if self._attached is None else self._attached.unsent_edits()
                with self._transport.wait:
                    ignored = self.leave(edits)
                if self._attached is not None:
                    self._attached.warn_ignored(ignored)
        except Exception as error:  # noqa: BLE001 - the lease ends by itself; a close must not fail
            say = log.debug if self._exiting else caller.warn
            say(f"could not leave: {error or type(error).__name__}")
        finally:
            self._end()

    def _end(self) -> None:
        self._closed = True
        self.memory.drop()
        self._transport.close()
        self._heartbeat.wait(timeout_s=1)

    def close_within(self, seconds: float) -> None:
        """Close it at the end of the process, which a server that is away must not hold up."""
        if self._closed or os.getpid() != self._pid:
            return
        self._exiting = True
        self._retry.give_up()
        self._transport.timeout_s = min(self._transport.timeout_s, seconds)
        if self._lands_within(seconds):
            with warnings.catch_warnings():
                warnings.simplefilter("always")  # an error would have nobody to go to
                self.close()
        else:
            self._heartbeat.stop()
            self._end()
            self._lands_within(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "a Session is a live connection and cannot be pickled or copied: connect() again, with another worker="
        )

    def __deepcopy__(self, memo: object) -> NoReturn:
        self.__getstate__()

    def __copy__(self) -> NoReturn:
        self.__getstate__()

    def __repr__(self) -> str:
        where = "reader" if self._member is None else f"epoch {self._member.epoch}"
        return f"<Session {self.worker!r} of model {self.model!r} at {self._transport.address}, {where}>"


def _row_ids(ids: Any, slot: Slot) -> list[int]:
    rows = np.asarray(ids)
    if rows.size and rows.dtype.kind not in "iu":
        raise WrongDtype(what=f"row ids of {slot.name!r}", got=rows.dtype, expected="integers")
    outside = [row for row in rows.ravel().tolist() if not 0 <= row < slot.rows]
    if outside:
        raise RowOutOfRange(parameter=slot.name, row=outside[0], rows=slot.rows)
    return [int(row) for row in rows.ravel()]
