"""The receipt that a push returns, as a Python value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from pushstep.proto import types_pb2 as pb
from pushstep.proto.wire.hyperparameters import values_of


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
