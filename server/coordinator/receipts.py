"""Writes receipts: what the sender of a push or an upload is told about its outcome. The server writes all of its receipts here.

A receipt is made when the outcome is decided. What only the step can tell, such as its times, is added after the step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pushstep.proto.errors import PushstepError, Superseded
from pushstep.proto.types_pb2 import (
    OUTCOME_APPLIED,
    OUTCOME_REJECTED,
    OUTCOME_SUPERSEDED,
    Identity,
    Outcome,
    Receipt,
    ServerTimes,
)

from .commits import Commits, Order, Written
from .push import PendingPush
from .sessions import Sessions
from .worker import RECEIPTS_KEPT, Decided, Worker, WorkerState


class Receipts:
    """Writes the receipts of one model, from its committed state."""

    def __init__(self, commits: Commits, sessions: Sessions) -> None:
        self._commits = commits
        self._sessions = sessions

    def of_upload(self, identity: Identity, worker: Worker, policy: str) -> Receipt:
        """The receipt of an upload, which has made the current version."""
        return self._receipt(identity, policy, lead=self._sessions.leads(worker), outcome=OUTCOME_APPLIED)

    def without_step(
        self,
        pending: PendingPush,
        policy: str,
        now_s: float,
        outcome: Outcome,
        reason: str,
        notes: Sequence[str] = (),
    ) -> Receipt:
        """The receipt of a push that changes nothing."""
        lead = self._sessions.leads(self._sessions.workers[pending.worker])
        version = self._commits.version
        return self._receipt(
            pending.identity,
            policy,
            lead=lead,
            outcome=outcome,
            reason=reason,
            notes=notes,
            **_of_push(pending, version, now_s),
        )

    def of_step(self, order: Order, written: Written, policy: str, now_s: float) -> list[Receipt]:
        """The receipts of a step's pushes. Its ticket has made the current version."""
        context, hooks = written.context, self._commits.hooks
        notes = [*order.notes]
        if context.factor != 1:
            notes.append(f"gradient scaled by {context.factor:.6g} ({hooks.transforms()})")
        elif context.operations:
            notes.append(f"gradient changed ({hooks.transforms()})")
        contributors = [pending.worker for pending in order.pushes]
        missing = hooks.missing_metrics()
        return [
            self._receipt(
                pending.identity,
                policy,
                lead=lead,
                outcome=OUTCOME_APPLIED,
                clip_factor=context.factor,
                lr_scale=order.lr_scale,
                step_norm=context.gradient_norm,
                contributors=contributors,
                notes=notes,
                ignored_edits=ignored,
                missing_metrics=missing,
                **_of_push(pending, context.version - 1, now_s),
            )
            for pending, lead, ignored in zip(order.pushes, written.leads, written.ignored, strict=True)
        ]

    def _receipt(
        self,
        identity: Identity,
        policy: str,
        *,
        lead: bool,
        outcome: Outcome,
        clip_factor: float = 1.0,
        lr_scale: float = 1.0,
        **fields: Any,
    ) -> Receipt:
        commits = self._commits
        return Receipt(
            identity=identity,
            version=commits.version,
            outcome=outcome,
            lead=lead,
            durability=commits.durability,
            clip_factor=clip_factor,
            lr_scale=lr_scale,
            policy=policy,
            groups=commits.groups.messages(),
            **fields,
        )


def _of_push(pending: PendingPush, version: int, now_s: float) -> dict[str, Any]:
    """The fields of every push's receipt. `version`: the current one when the push was decided."""
    return {
        "staleness": max(0, version - pending.header.base_version),
        "gradient_norm": 0.0 if pending.push is None else pending.push.norm,
        "times": ServerTimes(receive_s=pending.receive_s, wait_s=pending.waited_s + now_s - pending.staged_s),
    }


def complete(
    decided: Decided,
    lrs: Mapping[int, float],
    times: ServerTimes,
    failure: PushstepError | None,
    clip_factor: float | None = None,
) -> None:
    """Add to a stored outcome what only the step could tell: its times, learning rates, clipping and failure."""
    receipt = decided.receipt
    if clip_factor is not None:
        receipt.clip_factor = clip_factor
    receipt.times.queue_s, receipt.times.step_s = times.queue_s, times.step_s
    for group in receipt.groups:
        group.effective_lr = lrs.get(group.group, group.effective_lr)
    if failure is not None:
        decided.error = refuse_consumed(copy.copy(failure))
        receipt.outcome, receipt.reason = OUTCOME_REJECTED, failure.code


def superseded(receipt: Receipt) -> Receipt:
    """The receipt of a push whose step a restore has undone."""
    undone = Receipt()
    undone.CopyFrom(receipt)
    undone.outcome, undone.reason = OUTCOME_SUPERSEDED, Superseded.code
    return undone


def fill_published(sent: Receipt, receipt: Receipt, publish_s: float) -> None:
    """Fill in the receipt that an exchange sends: the stored one, with the time that publishing took."""
    sent.CopyFrom(receipt)
    sent.times.publish_s = publish_s


def refuse_consumed(error: PushstepError) -> PushstepError:
    """Mark an error as a push's outcome. The push has taken its sequence, and a retry gets the same error."""
    error.fields["consumed"] = "True"
    return error


def take_over_receipts(sessions: Sessions, rows: Iterable[Mapping[str, Any]], now_s: float) -> None:
    """Keep the receipts of a restored state that the worker table has lost. All epochs have ended.

    The table outlives restores, so it usually knows more than any snapshot. A crash takes it back to the snapshot that
    the start is from, and an operator may then restore a later one. A worker that the table has forgotten stays forgotten:
    its fence is, too. `rows`: the table there, as `Sessions.dump` wrote it.
    """
    for row in rows:
        known = sessions.workers.get(row["name"])
        gone = sessions.forgotten_before if known is None else known.forgotten
        held = set() if known is None else {each.key for each in known.decided_pushes}
        decided = [Decided.parsed(each) for each in row["verdicts"]]
        decided = [each for each in decided if each.key not in held and each.key > gone]
        forgotten = max(tuple(row.get("forgotten", (0, 0))), gone)
        if not decided:
            continue
        if known is None:
            state = WorkerState.EVICTED if row["state"] == WorkerState.EVICTED else WorkerState.LEFT
            epoch = max(int(row["epoch"]), sessions.forgotten_epoch, sessions.first_epoch)
            into = {**row, "epoch": epoch, "state": str(state)}
        else:
            decided = sorted([*known.decided_pushes, *decided], key=lambda each: each.key)
            into = known.dump()
        lost, kept = decided[:-RECEIPTS_KEPT], decided[-RECEIPTS_KEPT:]
        into["forgotten"] = list(max(forgotten, lost[-1].key) if lost else forgotten)
        into["verdicts"] = [each.dump() for each in kept]
        sessions.put(row["name"], into, now_s)
        sessions.mark_changed(row["name"])
