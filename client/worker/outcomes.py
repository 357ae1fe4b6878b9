"""Handles pushes without a usual answer: refused ones, resolved by a new join, undone by a restore."""

from __future__ import annotations

from pushstep.proto.errors import (
    CATALOGUE,
    Conflict,
    FateUnknown,
    Fenced,
    NoAnswer,
    PushstepError,
    Quarantined,
    RolledBack,
)
from pushstep.proto.types_pb2 import Identity

from ..membership.membership import Membership
from ..membership.receipt import Outcome, Receipt, own_receipt
from .cache import ParameterCache
from .flight import Flights


class Outcomes:
    """Turns such a push into a receipt with a warning, or into an error, as `on_reject` and `on_restore` say."""

    def __init__(
        self,
        membership: Membership,
        cache: ParameterCache,
        flights: Flights,
        on_reject: str,
        on_restore: str,
    ) -> None:
        """`cache` holds nothing of use after a restore. `flights` gives the warnings."""
        self._membership = membership
        self._cache = cache
        self._flights = flights
        self._on_reject = on_reject
        self._on_restore = on_restore
        self._metrics_named = False

    def refused(self, error: PushstepError, push: Identity, *, in_doubt: bool) -> Receipt:
        """Return the receipt of a push that was answered with an error. Raises the error if the push has none.

        NoAnswer leaves the push in doubt. FateUnknown if a fenced session cannot find out what became of it.
        """
        if isinstance(error, NoAnswer):
            self._membership.in_doubt = push
            raise error
        if in_doubt and isinstance(error, Fenced):
            # a fenced session may not join again to find out
            self._membership.in_doubt = None
            self._membership.compression.settle(applied=False)
            raise FateUnknown(sequence=push.sequence, worker=self._membership.worker) from error
        final = error.consumed or isinstance(error, (Conflict, Fenced))
        if in_doubt and not final:
            # this attempt was refused, but an earlier one without an answer may have been applied
            settled = self._membership.find_out(push)
            if settled is not None:
                return self.resolved(settled)
        elif error.consumed or isinstance(error, Conflict):
            self._membership.member().sequence = push.sequence
        if final or isinstance(error, Quarantined):
            receipt = own_receipt(Outcome.REJECTED, error.code, push, self._membership.member().version)
            return self._rejected(error, self._membership.note(receipt))
        raise error

    def _rejected(self, error: PushstepError, receipt: Receipt) -> Receipt:
        if self._on_reject == "raise":
            raise error
        self._flights.warn(f"push rejected: {error.message}")
        return receipt

    def resolved(self, receipt: Receipt) -> Receipt:
        """Note the receipt of a push that a new join has resolved, or that came after a restore; return it.

        Raises the error that the push was rejected with (on_reject="raise"), and Superseded after a restore that the
        caller does not know of yet (on_restore="raise"); otherwise warns.
        """
        member = self._membership.member()
        self._membership.note(receipt)
        if receipt.timeline != member.timeline:
            self._cache.forget()
        restored = self._membership.tell_restore()
        if restored is not None:
            if self._on_restore == "raise":
                raise restored
            became = "not applied" if receipt.outcome is Outcome.SUPERSEDED else f"{receipt.outcome} before"
            what = restored.message
            if not isinstance(restored, RolledBack):
                what = (
                    f"model {self._membership.model!r} was restored to version {member.version} "
                    f"(timeline {member.timeline})"
                )
            self._flights.warn(f"{what}; this step was {became}, going on from there")
        if receipt.outcome is Outcome.REJECTED:
            message = f"push {receipt.sequence} of epoch {receipt.epoch} was rejected: {receipt.reason}"
            return self._rejected(CATALOGUE[receipt.reason](message, consumed=True), receipt)
        return receipt

    def warn_of_metrics(self, receipt: Receipt) -> None:
        """Warn once that a hook waits for metrics that no push has reported."""
        if self._metrics_named:
            return
        self._metrics_named = True
        names = ", ".join(receipt.missing_metrics)
        self._flights.warn(
            f"a hook of model {self._membership.model!r} waits for {names}, which no push has reported, and does nothing until then: "
            f"call optimizer.report({receipt.missing_metrics[0]}=...) before step(), or push(..., metrics=)"
        )
