"""The receipt that a push returns, as a Python value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from pushstep.proto import types_pb2 as pb
from pushstep.proto.errors import CATALOGUE, PushstepError
from pushstep.proto.wire.hyperparameters import values_of

from ..notebook import brief, facts


class Outcome(StrEnum):
    """The outcome of a push."""

    APPLIED = "applied"
    SKIPPED = "skipped"
    DROPPED_LATE = "dropped_late"
    TOO_STALE = "too_stale"
    REJECTED = "rejected"
    SUPERSEDED = "superseded"


# by number: enum names are looked up once, not per receipt
_OUTCOMES = {pb.Outcome.Value(f"OUTCOME_{outcome.name}"): outcome for outcome in Outcome}
_DURABILITIES = {number: name.removeprefix("DURABILITY_").lower() for name, number in pb.Durability.items()}

# By outcome: what was done. The version is the one that the push made, or the model's then.
_WHAT_WAS_DONE: Final = {
    "applied": "The push was applied and made version {version}.",
    "skipped": "The push was skipped: nothing was applied, on purpose, and the model stayed at version {version}.",
    "dropped_late": (
        "The push was dropped: its round had closed before it came, and the model was at version {version}. A longer "
        "timeout_s of the policy would have waited for it, and late=carry would have taken it into the next round."
    ),
    "too_stale": (
        "The push was dropped as too stale: the model was at version {version}, further on than the policy allows. Pull "
        "more often, or raise max_staleness."
    ),
    "rejected": "The push was rejected, and the model stayed at version {version}.",
    "superseded": (
        "The push was not applied: the model was restored meanwhile. The session goes on from version {version}."
    ),
}
_HOW_SAFE: Final = {
    "applied": "It is in memory: a crash would set the model back to version {durable_version}, the newest snapshot's.",
    "everysec": "It reaches the disk within a second; version {durable_version} was there already.",
    "durable": "It was on the disk before this receipt was sent.",
}
# By phase: what happened in it. Those shorter than a tenth of the whole are not told.
_PHASES: Final = {
    "receive_s": "being received",
    "queue_s": "waiting for its turn",
    "wait_s": "waiting for its policy to let it in",
    "step_s": "being stepped",
    "publish_s": "being published",
}


@dataclass(frozen=True, slots=True)
class Receipt:
    """The receipt of one push. `times` holds the seconds spent in each phase on the server."""

    outcome: Outcome
    reason: str
    worker: str
    epoch: int
    sequence: int
    timeline: int
    version: int
    staleness: int = 0
    gradient_norm: float = 0.0
    clip_factor: float = 1.0
    groups: Sequence[Mapping[str, float | bool]] = ()
    effective_lr: Sequence[float] = ()
    ignored_edits: Sequence[str] = ()
    lead: bool = False
    durability: str = ""
    # the newest version that no crash could undo when the receipt was sent
    durable_version: int = 0
    duplicates: int = 0
    # the workers whose pushes made this version, in the order in which they were added up
    contributors: Sequence[str] = ()
    # the factor of the policy on the lr; the norm of the stepped gradient; in words, what was done to the push and why
    lr_scale: float = 1.0
    step_norm: float = 0.0
    notes: Sequence[str] = ()
    policy: str = ""
    # metrics that hooks of the model wait for and no push has reported: see RemoteOptimizer.report
    missing_metrics: Sequence[str] = ()
    times: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        """The outcome and identity of the push, and the fields that differ from the usual."""
        said = [
            f"outcome={str(self.outcome)!r}",
            f"version={self.version}",
            f"staleness={self.staleness}",
            f"gradient_norm={self.gradient_norm:.6g}",
            f"worker={self.worker!r}",
            f"epoch={self.epoch}",
            f"sequence={self.sequence}",
        ]
        for name in ("reason", "clip_factor", "lr_scale", "ignored_edits", "duplicates", "notes"):
            value = getattr(self, name)
            if value and value != 1.0:
                said.append(f"{name}={value!r}")
        if len(self.contributors) > 1:
            said.append(f"contributors={len(self.contributors)}")
        return f"Receipt({', '.join(said)})"

    def explain(self) -> str:
        """What became of the push, in sentences: applied or not and why, how stale, what was clipped, where time went."""
        return "\n".join(_sentences(self))

    def __str__(self) -> str:
        return self.explain()

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        first, *rest = _sentences(self)
        return facts(first, [("", sentence) for sentence in rest])

    @classmethod
    def of(cls, message: pb.Receipt) -> Receipt:
        """A receipt from its message."""
        times = message.times
        return cls(
            outcome=_OUTCOMES[message.outcome],
            reason=message.reason,
            worker=message.identity.worker,
            epoch=message.identity.epoch,
            sequence=message.identity.sequence,
            timeline=message.identity.timeline,
            version=message.version,
            staleness=message.staleness,
            gradient_norm=message.gradient_norm,
            clip_factor=message.clip_factor,
            groups=[values_of(group) for group in message.groups],
            effective_lr=[group.effective_lr for group in message.groups],
            ignored_edits=list(message.ignored_edits),
            lead=message.lead,
            durability=_DURABILITIES[message.durability],
            durable_version=message.durable_version,
            duplicates=message.duplicates,
            contributors=list(message.contributors),
            lr_scale=message.lr_scale,
            step_norm=message.step_norm,
            notes=list(message.notes),
            policy=message.policy,
            missing_metrics=list(message.missing_metrics),
            times={
                "receive_s": times.receive_s,
                "queue_s": times.queue_s,
                "wait_s": times.wait_s,
                "step_s": times.step_s,
                "publish_s": times.publish_s,
            },
        )


def own_receipt(outcome: Outcome, reason: str, push: pb.Identity, version: int) -> Receipt:
    """A receipt made here, for a push for which the server holds none."""
    return Receipt(outcome, reason, push.worker, push.epoch, push.sequence, push.timeline, version)


def _sentences(receipt: Receipt) -> Iterator[str]:
    applied = receipt.outcome is Outcome.APPLIED
    yield _WHAT_WAS_DONE[receipt.outcome].format(version=receipt.version)
    if receipt.reason:
        yield f"Why: {_why(receipt.reason)} ({receipt.reason})."
    yield (
        f"It was push {receipt.sequence} of worker {receipt.worker!r} in epoch {receipt.epoch}"
        f"{', the lead' if receipt.lead else ''}, on timeline {receipt.timeline}"
        f"{f', under the policy {receipt.policy}' if receipt.policy else ''}."
    )
    if len(receipt.contributors) > 1:
        yield f"The version adds up the pushes of {len(receipt.contributors)} workers: {brief(receipt.contributors, 8)}."
    if applied:
        yield _staleness(receipt.staleness)
        yield from _gradient(receipt)
    if receipt.notes:
        yield f"On the way: {'; '.join(receipt.notes)}."
    if receipt.duplicates:
        times = "once" if receipt.duplicates == 1 else f"{receipt.duplicates} times"
        yield f"It came {times} more, as a retry does; it counts once."
    if receipt.ignored_edits:
        yield (
            f"Edits of hyperparameters that did not count: {brief(receipt.ignored_edits, 8)}. Only the lead's count, and not of "
            "what an operator holds or a hook schedules."
        )
    if receipt.missing_metrics:
        yield f"A hook waits for {brief(receipt.missing_metrics, 8)}: call optimizer.report() before step()."
    if applied and receipt.durability in _HOW_SAFE:
        yield _HOW_SAFE[receipt.durability].format(durable_version=receipt.durable_version)
    yield from _times(receipt)


def _why(code: str) -> str:
    """The first sentence of a catalogue error's docstring."""
    described = CATALOGUE.get(code, PushstepError).__doc__ or code
    return described.splitlines()[0].rstrip(".")


def _staleness(staleness: int) -> str:
    if not staleness:
        return "Its gradient was of the newest version: no other push came between."
    others = "1 version" if staleness == 1 else f"{staleness} versions"
    return f"Its gradient was {others} behind: so many were made between the pull and the push."


def _gradient(receipt: Receipt) -> Iterator[str]:
    said = f"The gradient's norm was {receipt.gradient_norm:.6g}"
    if receipt.clip_factor != 1.0:
        said += f"; it was multiplied by {receipt.clip_factor:.6g} before the step, as clipping does"
    yield f"{said}."
    if receipt.lr_scale != 1.0:
        yield f"The policy multiplied the learning rate by {receipt.lr_scale:.6g}: so much the push weighs."
    if receipt.effective_lr:
        yield f"Learning rate by group: {brief([f'{lr:.6g}' for lr in receipt.effective_lr], 8)}."


def _times(receipt: Receipt) -> Iterator[str]:
    total_s = sum(receipt.times.values())
    if total_s <= 0:
        return
    phases = sorted(receipt.times.items(), key=lambda entry: -entry[1])
    told = [f"{_duration(s)} {_PHASES.get(name, name)}" for name, s in phases if s >= total_s / 10]
    yield f"It took the server {_duration(total_s)}: {', '.join(told)}."


def _duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
