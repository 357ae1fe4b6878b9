"""The optimizer's state as checkpoints hold it: fetched from the server, and loaded to there.

A state belongs to the parameters that it was saved with. Scripts load the two in any order around attach, and the server may
be where the checkpoint is, or ahead of it, or behind. In each case the model becomes what a local run would be: the values
that the script has loaded, before attach or after, with the state that it loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from . import caller, remote_state
from .attached import Attached
from .digests import digest_of
from .receipt import Receipt


class Checkpoints:
    """What `state_dict()` and `load_state_dict()` of an attached optimizer do."""

    def __init__(self, attached: Attached) -> None:
        self._attached = attached
        # the digest of what was returned last, and the server's groups then: None once a step was taken
        self._returned: Any = None
        self._groups: list[Any] = []

    def forget(self) -> None:
        """A step was taken."""
        self._returned = None
        self._attached.stepped()

    def fetch(self, receipt: Receipt | None) -> list[dict[str, Any]]:
        """The state_dict of each optimizer, with the edits that the next push will carry."""
        attached = self._attached
        if attached.parameters.fresh:
            attached.send_edits(())
        pulled = attached.session.pull_state()
        self._groups = list(pulled.header.groups)
        pending = attached.hyperparameters.pending(attached.groups, receipt)
        count = len(attached.optimizers)
        return remote_state.fetched(pulled, attached.groups, pending, count, attached.parameters.name_of)

    def returned(self, value: Any) -> None:
        """What the user was given of it."""
        self._returned = digest_of(value)

    def load(self, dicts: Sequence[Mapping[str, Any]], *, whole: Any, force: bool) -> None:
        """Have the server hold what each optimizer's state_dict does; `whole`: as the user gave them."""
        attached = self._attached
        if len(dicts) != len(attached.optimizers):
            raise ValueError(f"{len(dicts)} state dicts for {len(attached.optimizers)} optimizers")
        if self._returned is not None and self._returned == digest_of(whole):
            # in every worker, Accelerate does so at its start: nobody's state is touched
            attached.hyperparameters.write(attached.groups, self._groups)
            remote_state.write_groups(dicts, attached.groups)
            return
        session, parameters = attached.session, attached.parameters
        layout = session.member().layout
        slot_of = partial(parameters.slot_of, layout=layout)
        loading = remote_state.Loading(dicts, attached.groups, layout, slot_of)
        edited = attached.edited()
        here = not edited and not parameters.fresh
        held = session.pull_state() if here else None
        if held is not None and loading.is_held(held):
            # in every worker that goes on from the checkpoint at which the server is: its hyperparameters are the lead's edit
            attached.hyperparameters.write(attached.groups, held.header.groups)
            remote_state.write_groups(dicts, attached.groups, hyperparameters=attached.hyperparameters.leads)
            self._stay()
        else:
            self._replace(loading, edited, force=force)
            remote_state.write_groups(dicts, attached.groups)

    def _stay(self) -> None:
        """The server holds the state that was loaded. Does it hold the module's values, too?"""
        attached = self._attached
        if attached.overwritten.values:
            # made at random, as likely as not, and to be loaded next: nothing that was trained is given up for them
            name = next(iter(attached.overwritten.values))
            caller.warn(
                f"model {attached.session.model!r} holds the state that was loaded, and its own values, which are not those of "
                f"this worker before attach (parameter {name!r}): load the module after attach if it is to go back to others"
            )
        else:
            attached.extras.put_back()  # the module was at this checkpoint before attach
            attached.extras.send_if_possible()

    def _replace(self, loading: remote_state.Loading, edited: Sequence[str], *, force: bool) -> None:
        attached = self._attached
        session, parameters = attached.session, attached.parameters
        layout = session.member().layout
        values = parameters.values(layout, edited)
        brought = attached.overwritten.values
        values.update({(layout.slot(name, session.model), ""): value for name, value in brought.items()})
        member = session.replace_state(loading.header(force), {**loading.values, **values})
        parameters.fresh.clear()
        version = 0 if parameters.at is None else parameters.at[1]
        if brought:
            caller.warn(
                f"model {session.model!r} was at version {version}, which attach took: it has gone back to the values that this "
                "worker had before, with the state that was loaded"
            )
            attached.extras.put_back()
        self.forget()
        attached.hyperparameters.leads = member.lead
        attached.hyperparameters.write(attached.groups, member.groups)
        parameters.take(session.pull_message(None))
        attached.extras.send_if_possible()
