"""`state_dict()` and `load_state_dict()` of an attached optimizer: fetched from the server, and loaded to there.

A state belongs to the parameters that it was saved with. Scripts load the two in any order around attach. The server may
be at the checkpoint's version, ahead of it, or behind it. In each case the model becomes what a local run would have: the
values that the script loaded, before attach or after, with the state that it loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..membership.receipt import Receipt
from ..warn import warn
from . import state_dict as remote_state
from .attached import Attached
from .digests import digest_of


class Checkpoints:
    """Owns the digest of the last returned state_dict; fetches and loads the state of an attached optimizer."""

    def __init__(self, attached: Attached) -> None:
        self._attached = attached
        # digest of the last returned state_dict (None once a step was taken), and the server's groups at that time
        self._returned: Any = None
        self._groups: list[Any] = []

    def forget(self) -> None:
        """Forget the last returned state_dict and what attach has overwritten: a step was taken."""
        self._returned = None
        self._attached.stepped()

    def fetch(self, receipt: Receipt | None) -> list[dict[str, Any]]:
        """Return the state_dict of each optimizer, with the edits that the next push will carry."""
        attached = self._attached
        if attached.parameters.fresh:
            attached.send_edits(())
        pulled = attached.worker.pull_state()
        self._groups = list(pulled.header.groups)
        pending = attached.hyperparameters.pending(attached.groups, receipt)
        count = len(attached.optimizers)
        return remote_state.fetched(pulled, attached.groups, pending, count, attached.parameters.name_of)

    def returned(self, value: Any) -> None:
        """Remember the digest of the state_dict that the user was given."""
        self._returned = digest_of(value)

    def load(self, dicts: Sequence[Mapping[str, Any]], *, whole: Any, force: bool) -> None:
        """Make the server hold the state of `dicts`, one per optimizer; `whole`: the user's own argument.

        Raises ValueError for a wrong number of dicts, or for one that does not fit.
        """
        attached = self._attached
        if len(dicts) != len(attached.optimizers):
            raise ValueError(f"{len(dicts)} state dicts for {len(attached.optimizers)} optimizers")
        if self._returned is not None and self._returned == digest_of(whole):
            # Accelerate does this in every worker at its start: no state may change
            attached.hyperparameters.write(attached.groups, self._groups)
            remote_state.write_groups(dicts, attached.groups)
            return
        worker, parameters = attached.worker, attached.parameters
        layout = worker.member().layout
        slot_of = partial(parameters.slot_of, layout=layout)
        loading = remote_state.Loading(dicts, attached.groups, layout, slot_of)
        edited = attached.edited()
        here = not edited and not parameters.fresh
        held = worker.pull_state() if here else None
        if held is not None and loading.is_held(held):
            # every worker that continues from the server's own checkpoint comes here: only the lead edits hyperparameters
            attached.hyperparameters.write(attached.groups, held.header.groups)
            remote_state.write_groups(dicts, attached.groups, hyperparameters=attached.hyperparameters.leads)
            self._stay()
        else:
            self._replace(loading, edited, force=force)
            remote_state.write_groups(dicts, attached.groups)

    def _stay(self) -> None:
        """Keep the server's state, which is the loaded one. Restore the buffers that the module held before attach.

        Warn instead if attach has overwritten other parameter values, which then stay overwritten.
        """
        attached = self._attached
        if attached.overwritten.values:
            # these values are probably random initial ones that the script loads next: they must not replace trained ones
            name = next(iter(attached.overwritten.values))
            warn(
                f"model {attached.worker.model!r} holds the state that was loaded, and its own values, which are not those of "
                f"this worker before attach (parameter {name!r}): load the module after attach if it is to go back to others"
            )
        else:
            attached.extras.put_back()  # the module held this checkpoint before attach
            attached.extras.send_if_possible()

    def _replace(self, loading: remote_state.Loading, edited: Sequence[str], *, force: bool) -> None:
        attached = self._attached
        worker, parameters = attached.worker, attached.parameters
        layout = worker.member().layout
        values = parameters.values(layout, edited)
        brought = attached.overwritten.values
        values.update({(layout.slot(name, worker.model), ""): value for name, value in brought.items()})
        member = worker.membership.replace_state(loading.header(force), {**loading.values, **values})
        parameters.fresh.clear()
        version = 0 if parameters.at is None else parameters.at[1]
        if brought:
            warn(
                f"model {worker.model!r} was at version {version}, which attach took: it has gone back to the values that this "
                "worker had before, with the state that was loaded"
            )
        attached.extras.put_back()  # the buffers of before attach belong to the state, also if no parameter differed
        self.forget()
        attached.hyperparameters.leads = member.lead
        attached.hyperparameters.write(attached.groups, member.groups)
        parameters.take(worker.pull_message(None))
        attached.extras.send_if_possible()
