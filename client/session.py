"""The session of one worker with one model: what `connect` returns.

A Session has a Worker, which makes its pushes, and adds what a user needs: parameters by name as numpy arrays, an
attached optimizer, and `close`, after which the model goes on without this worker.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self, overload

import torch
from torch import Tensor, nn

from pushstep.optim.state_dict import tensor_of
from pushstep.proto.errors import InvalidSettings, NotAttached, UnsupportedModule
from pushstep.proto.wire.layout import Layout

from .attachment.manifest import of_arrays
from .attachment.originals import as_optimizers
from .gradients.body import as_array, as_gradient, by_slot, row_ids
from .membership.at_exit import close_at_exit
from .membership.member import Member
from .membership.policy import Policy, for_workers
from .membership.receipt import Receipt
from .notebook import facts
from .optimizer.options import Edits, Progress
from .optimizer.remote_optimizer import RemoteOptimizer, named_after
from .shards.transport import ShardedTransport
from .shared_memory.sharing import SharedMemory
from .transport.shield import shield
from .transport.streams import Pulled
from .warn import warn
from .worker.cache import Array
from .worker.options import WorkerOptions
from .worker.ranks import Ranks
from .worker.row_cache import RowCache
from .worker.row_cache import Source as RowSource
from .worker.rows_asked import RowsAsked
from .worker.worker import Worker

log = logging.getLogger("pushstep.client")


class Session:
    """One worker's session; see `connect`. Not for use by several threads at once."""

    def __init__(self, transport: ShardedTransport, options: WorkerOptions) -> None:
        self._worker = Worker(transport, options)
        self._membership = self._worker.membership
        self._cache = self._worker.cache
        self._transport = transport
        self._exiting = False
        close_at_exit(self)
        self._attached: RemoteOptimizer | None = None

    @property
    def model(self) -> str:
        """The model's name."""
        return self._membership.model

    @property
    def worker(self) -> str:
        """The worker's name."""
        return self._membership.worker

    @property
    def worker_state(self) -> bytes:
        """Up to 64 KiB of this worker's own bytes, such as its place in the data or its random state.

        A value that is set here travels with the next push. The server keeps it with the model, in its snapshots too. A
        session that joins under this worker's name finds the value of the last push under that name.
        """
        return self._membership.worker_state.value(self._membership.current)

    @worker_state.setter
    def worker_state(self, value: bytes) -> None:
        self._membership.worker_state.set(value)

    @property
    def last_receipt(self) -> Receipt | None:
        """The receipt of the last push that was answered."""
        return self._membership.last_receipt

    @property
    def memory(self) -> SharedMemory:
        """The memory that is shared with a server on this host."""
        return self._worker.memory

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
        progress: Progress | None = None,
    ) -> RemoteOptimizer:
        """Return an optimizer whose steps the server takes, in place of torch's or pushstep.optim's Adadelta or Adagrad.

        The first worker to attach creates the model from its parameters' values and its optimizers' states. Later
        workers take the server's values and hyperparameters. Names come from `module`, else from `names`, else from the
        optimizer. A list of optimizers makes one model. `policy`: the model's policy, if this call creates it; see
        `create`. policy="sync", workers=N does what DistributedDataParallel does with N ranks, without the wrapper.

        `overlap`: gradients leave while backward still runs; `step()` sends them again if they were changed since. With
        shared memory `overlap` has nothing to send. `prefetch`: `step()` does not wait for its answer, the next `step()`
        takes it. Each gradient is then computed on the parameters of one step earlier, as `staleness` in its receipt
        says. `prefetch` always sends frames.

        `edits`: what to do when code here writes to parameters between steps (clamping, a renorm, `.data`). "sample"
        refuses the next step by LocalParameterEdit. It finds every write that torch counts and every changed address; it
        finds other writes by samples of the memory, so it finds all that touch whole tensors. "check" compares all of the
        memory. "upload" compares all of it and sends the changed parameters as a version of their own.

        `progress`: called with each step's receipt when the step is over, such as `lambda receipt: bar.update()`.

        A session steps one model, so a second attach is refused. An attach that fails leaves nothing behind.
        """
        self._membership.check_usable()
        self._check_free()
        if overlap and self._worker.compression.owes:
            # a residual is resolved push by push, and an early push may still be withdrawn
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
            self._worker.ranks = ranks
            made = self._attached = named_after(optimizers)(
                self,
                self._worker,
                optimizers,
                module,
                names,
                asked,
                single=single,
                overlap=overlap,
                prefetch=prefetch,
                edits=edits,
                progress=progress,
                undo=undo,
            )
            ranks.say(self._membership.member().policy, chosen=asked is not None)
            shield.check()  # an interrupted caller gets no optimizer, so the attach must be undone
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
        """Create the model from arrays by name. If it exists, join it; its values stand.

        Each group is {"rule": "adadelta" or "adagrad", "params": [names], and hyperparameters}; None puts all
        parameters into one Adadelta group. `policy` says when pushes are applied: "async", "bounded", "sync", or a
        mapping with the settings that PATCH /v1/models/{m}/policy takes. `workers`: how many a "sync" round waits for.
        """
        self._membership.check_usable()
        self._check_free()
        asked = for_workers(policy, workers)
        manifest, values = of_arrays(parameters, groups)
        self._membership.join_or_create(
            manifest, lambda layout: {(slot, ""): values[slot.name] for slot in layout.slots}, policy=asked
        )
        self._membership.join_by_name()

    # Pushing.

    @shield
    def push(
        self, grads: Mapping[str, Any], metrics: Mapping[str, float] | None = None, samples: float = 0
    ) -> Receipt:
        """Push gradients by name: arrays, tensors, or (ids, rows) pairs. Returns the receipt once the push is decided.

        `samples`: the number of samples behind the gradients, which is their weight in a round; 0 counts as 1.
        """
        commit = self._worker.commit(metrics, samples=samples)
        receipt, _ = self._worker.step(
            by_slot(grads, self._membership.member().layout, self.model), self._cache.at, commit, pull=False
        )
        return receipt

    @shield
    def exchange(
        self, grads: Mapping[str, Any], metrics: Mapping[str, float] | None = None, samples: float = 0
    ) -> tuple[Receipt, dict[str, Array]]:
        """Push and pull in one round trip: the receipt, and every parameter at its version or a newer one."""
        commit = self._worker.commit(metrics, samples=samples)
        receipt, pulled = self._worker.step(
            by_slot(grads, self._membership.member().layout, self.model), self._cache.at, commit, pull=True
        )
        if pulled is None:
            return receipt, self.pull()
        self._cache.take(pulled)
        return receipt, self._arrays()

    # Pulling.

    @shield
    def pull(self) -> dict[str, Array]:
        """Return every parameter by name at the newest version. A session that only pulls is a reader and never joins."""
        self._membership.check_usable()
        self._worker.pull_into_cache()
        return self._arrays()

    @overload
    def pull_rows(self, name: str, ids: Any) -> Array: ...

    @overload
    def pull_rows(self, name: Mapping[str, Any]) -> dict[str, Array]: ...

    @shield
    def pull_rows(self, name: str | Mapping[str, Any], ids: Any = None) -> Array | dict[str, Array]:
        """Return rows of one parameter in the order of `ids`, or of several: {name: ids} gives {name: rows}.

        All are of one version. An id may be repeated, and travels once.
        """
        self._membership.check_usable()
        wanted = {name: ids} if isinstance(name, str) else name
        layout = self._layout_for_reading()
        slots = {each: layout.slot(each, self.model) for each in wanted}
        named = {each: row_ids(wanted[each], slot) for each, slot in slots.items()}
        _, pulled = self._worker.pull_rows(
            RowsAsked({slot: named[each] for each, slot in slots.items()}), layout
        )
        rows = {each: as_array(pulled[slot]) for each, slot in slots.items()}
        return rows[name] if isinstance(name, str) else rows

    def row_cache(self, max_staleness: int = 1, most_rows: int = 1 << 20) -> RowCache:
        """Return a cache of rows for a worker that does not hold the tables; see `RowCache`.

        `get({name: ids})` is `pull_rows` with rows that may be up to `max_staleness` versions old; `prefetch({name: ids})`
        begins to pull those of the next batch beside the push of this one.
        """
        source = RowSource(
            self._layout_for_reading,
            self._known,
            self._worker.begin_rows,
            shield(self._worker.pull_rows),
            self.model,
        )
        return RowCache(source, max_staleness, most_rows)

    def _known(self) -> tuple[int, int]:
        """The newest (timeline, version) that this session was told of."""
        self._membership.check_usable()
        told = (self._membership.last_receipt, self._membership.current)
        return max(((each.timeline, each.version) for each in told if each is not None), default=(0, 0))

    def pull_state(self) -> Pulled:
        """Parameters, optimizer state and step counts at one version."""
        return self._worker.pull_state()

    def member(self) -> Member:
        """The membership. Joins first if there is none, and resolves a push or a join in doubt."""
        return self._membership.member()

    def _layout_for_reading(self) -> Layout:
        if self._membership.current is not None:
            return self._membership.current.layout
        while self._cache.layout is None:
            self.pull()
        return self._cache.layout

    def _arrays(self) -> dict[str, Array]:
        arrays = self._cache.arrays()
        if arrays is None:
            # a group was added, which makes no new version: the pull did not bring its parameters
            self._cache.forget()
            return self.pull()
        return arrays

    @property
    def version(self) -> int | None:
        """The version of the last pull."""
        return None if self._cache.at is None else self._cache.at[1]

    # Uploading.

    @shield
    def upload(self, values: Mapping[str, Any] | None = None) -> int:
        """Send values as a new version and return it. None: the attached optimizer's, or else NotAttached."""
        if values is None:
            if self._attached is None:
                raise NotAttached(problem="no optimizer is attached: pass values={name: array}")
            return self._attached.upload()
        member = self._membership.member()
        slots = {member.layout.slot(name, self.model): tensor_of(v) for name, v in values.items()}
        for slot, value in slots.items():
            as_gradient(value, slot)
        return self._membership.upload_values(
            {(slot, ""): value.to(slot.dtype) for slot, value in slots.items()}
        )

    # Closing.

    @shield
    def close(self) -> None:
        """Leave the model and close the connection. Closing twice, or in a forked child, does nothing."""
        membership = self._membership
        if membership.is_over:
            return
        membership.heartbeat.stop()
        membership.retry.give_up()
        try:
            if membership.current is not None:
                self._worker.run_before_close()
                edits = {} if self._attached is None else self._attached.unsent_edits()
                with self._transport.wait:
                    ignored = membership.leave(edits)
                if self._attached is not None:
                    self._attached.warn_ignored(ignored)
        except Exception as error:  # noqa: BLE001 - the lease ends by itself; close must not fail
            say = log.debug if self._exiting else warn
            say(f"could not leave: {error or type(error).__name__}")
        finally:
            self._worker.end()

    def close_within(self, seconds: float) -> None:
        """Close the session at the end of the process, within `seconds` even if the server does not answer."""
        if self._membership.is_over:
            return
        self._exiting = True
        if self._worker.hurry(seconds):
            with warnings.catch_warnings():
                warnings.simplefilter("always")  # a filter "error" would raise, and nobody would catch it
                self.close()
        else:
            self._membership.heartbeat.stop()
            self._worker.end()
            self._worker.hurry(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a Session is a live connection and cannot be pickled or copied: connect() again, with another worker="
        )

    def __repr__(self) -> str:
        return (
            f"<Session {self.worker!r} of model {self.model!r} at {self._transport.address}, {self._state()}>"
        )

    def _state(self) -> str:
        if self._membership.is_over:
            return "closed" if self._membership.closed else "of another process"
        member = self._membership.current
        return "reader" if member is None else f"epoch {member.epoch}"

    def _repr_html_(self) -> str:
        receipt = self.last_receipt
        last = "none yet" if receipt is None else receipt.explain()
        where = f"model {self.model!r} at {self._transport.address}, {self._state()}"
        return facts(f"Session {self.worker!r}", [("of", where), ("last push", last)])
