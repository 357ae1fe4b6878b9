"""The metrics of each model. All are read in a thread from plain numbers that the event loop goes on counting.

Labels are the model's name and words of this program: `--max-models` bounds the names, a deleted model's series end, and
no worker's name is a label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Final

from ..coordinator.policies.synchronous import COMPLETE, QUORUM, TIMEOUT
from ..coordinator.worker import WorkerState
from ..counters.model_counts import OUTCOMES
from ..models.model import Model
from .family import Family, Kind, Reading

COUNTER, GAUGE, HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
UNSPECIFIED: Final = 0


class ModelView:
    """One model during one scrape: its worker table is looked through once for all metrics."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.counts = model.counts

    @cached_property
    def workers(self) -> Mapping[str, float]:
        """Workers by state, and how far the live ones are behind."""
        found = dict.fromkeys([*WorkerState, "quarantined", "lag", "silence"], 0.0)
        model, version, now_s = self.model, self.model.version, self.model.clock()
        for worker in list(model.sessions.workers.values()):
            if worker.quarantined:
                found["quarantined"] += 1
            found[worker.state] += 1
            if worker.state is WorkerState.LIVE:
                found["lag"] = max(found["lag"], version - worker.base_version)
                found["silence"] = max(found["silence"], now_s - worker.last_seen_s)
        return found


def _outcomes(view: ModelView) -> Iterable[Reading]:
    counted = view.counts.outcomes
    return [((name,), counted[number]) for number, name in OUTCOMES.items() if number != UNSPECIFIED]


def _rooms(view: ModelView) -> Iterable[Reading]:
    counts = view.counts
    for room, seconds in counts.rooms.items():
        if room != "journal" or counts.journal.records:
            yield (room,), seconds


def _by_word(counted: Mapping[str, float]) -> Iterable[Reading]:
    return [((word,), number) for word, number in sorted(dict(counted).items())]


def _rounds(view: ModelView) -> Iterable[Reading]:
    closed = view.model.coordinator.pending_pushes.rounds.closed
    return [((word,), closed.get(word, 0)) for word in (COMPLETE, QUORUM, TIMEOUT)]


def _workers(view: ModelView) -> Iterable[Reading]:
    return [((state,), view.workers[state]) for state in WorkerState]


def _memory(view: ModelView) -> Iterable[Reading]:
    model = view.model
    layout = model.layout
    parameters = sum(arena.elements * arena.dtype.itemsize for arena in layout.arenas)
    extras = model.extras.nbytes
    yield ("parameters",), parameters
    yield ("extras",), extras
    # what --max-bytes counts beside them: optimizer state, the layout, rows' versions
    yield ("state",), model.held_bytes - parameters - extras
    yield ("workers",), model.sessions.kept_bytes


def _journal(view: ModelView, number: str) -> Iterable[Reading]:
    journal = view.model.recorder.journal
    return [] if journal is None else [((), float(getattr(journal, number)))]


def _snapshot_s(view: ModelView) -> Iterable[Reading]:
    created_s = view.counts.snapshots.created_s
    return [((), created_s)] if created_s else []


MODEL_METRICS: Final[tuple[Family[ModelView], ...]] = (
    Family(
        "pushstep_pushes_total",
        COUNTER,
        "Pushes and uploads that got an outcome. How fast does training go, and what becomes of pushes?",
        _outcomes,
        ("outcome",),
    ),
    Family(
        "pushstep_push_refusals_total",
        COUNTER,
        "Pushes that were answered with an error, by its code. Why do pushes not count?",
        lambda view: _by_word(view.counts.refusals),
        ("code",),
    ),
    Family(
        "pushstep_push_duplicates_total",
        COUNTER,
        "Pushes that came again and were answered with their first receipt. How often are answers lost?",
        lambda view: [((), view.model.sessions.duplicates)],
    ),
    Family(
        "pushstep_push_seconds",
        HISTOGRAM,
        "Time of a push in each room, as in its receipt. Where does a push spend its time?",
        _rooms,
        ("room",),
    ),
    Family(
        "pushstep_push_staleness_versions",
        HISTOGRAM,
        "Versions applied between the one that a gradient was computed on and its step. How stale are gradients?",
        lambda view: [((), view.counts.staleness)],
    ),
    Family(
        "pushstep_pushes_pending",
        GAUGE,
        "Pushes whose body is complete and that have no outcome yet. What waits for a round or for the writer?",
        lambda view: [((), len(view.model.held))],
    ),
    Family(
        "pushstep_pulls_total",
        COUNTER,
        "Pulls that were answered, without those of exchanges. How much is read beside training?",
        lambda view: [((), view.counts.pulls)],
    ),
    Family(
        "pushstep_rounds_total",
        COUNTER,
        "Rounds of the policy sync that ended, by what ended them. Do rounds close because all have pushed?",
        _rounds,
        ("closed_by",),
    ),
    Family(
        "pushstep_round_seconds",
        HISTOGRAM,
        "Time from a round's first push to its end. How long does the slowest worker keep the others waiting?",
        lambda view: [((), view.model.coordinator.pending_pushes.rounds.open)],
    ),
    Family(
        "pushstep_round_pushes",
        HISTOGRAM,
        "Pushes in a round. How many workers contribute?",
        lambda view: [((), view.model.coordinator.pending_pushes.rounds.pushes)],
    ),
    Family(
        "pushstep_version",
        GAUGE,
        "The model's version. How far is training? It goes back at a restore.",
        lambda view: [((), view.model.version)],
    ),
    Family(
        "pushstep_durable_version",
        GAUGE,
        "The newest version that no crash can undo. How many versions would a crash cost?",
        lambda view: [((), view.model.recorder.durable_version)],
    ),
    Family(
        "pushstep_timeline",
        GAUGE,
        "The model's timeline. How often was it restored?",
        lambda view: [((), view.model.timeline)],
    ),
    Family(
        "pushstep_events_total",
        COUNTER,
        "Events, by kind, as in GET /v1/models/{m}/events. What has happened, and how often?",
        lambda view: _by_word(view.model.events.counts),
        ("kind",),
    ),
    Family(
        "pushstep_workers",
        GAUGE,
        "Workers that the server knows, by state. Who is there?",
        _workers,
        ("state",),
    ),
    Family(
        "pushstep_workers_quarantined",
        GAUGE,
        "Workers in quarantine. Does anybody send rubbish?",
        lambda view: [((), view.workers["quarantined"])],
    ),
    Family(
        "pushstep_worker_lag_versions",
        GAUGE,
        "The most versions that a live worker's last gradient is behind. Is one worker left behind?",
        lambda view: [((), view.workers["lag"])],
    ),
    Family(
        "pushstep_worker_silence_seconds",
        GAUGE,
        "The longest time for which a live worker was not heard of. Is one about to be lost?",
        lambda view: [((), view.workers["silence"])],
    ),
    Family(
        "pushstep_model_bytes",
        GAUGE,
        "Memory of a model, by what it is for. Which model takes the memory?",
        _memory,
        ("of",),
    ),
    Family(
        "pushstep_model_failed",
        GAUGE,
        "1 while a model takes nothing because a write has left it torn. Does a model need a restore?",
        lambda view: [((), view.model.failed is not None)],
    ),
    Family(
        "pushstep_parameters_nonfinite",
        GAUGE,
        "Parameters that hold NaN or infinity. Has training diverged?",
        lambda view: [((), len(view.model.nonfinite))],
    ),
    Family(
        "pushstep_snapshot_created_timestamp_seconds",
        GAUGE,
        "When the newest snapshot was taken. How old is it? See `time() - ...`.",
        _snapshot_s,
    ),
    Family(
        "pushstep_snapshot_version",
        GAUGE,
        "The version in the newest snapshot. Has the model changed since?",
        lambda view: [((), view.counts.snapshots.version)],
    ),
    Family(
        "pushstep_snapshot_bytes",
        GAUGE,
        "Bytes of the newest snapshot's files. How much disk does one more take?",
        lambda view: [((), view.counts.snapshots.newest_bytes)],
    ),
    Family(
        "pushstep_snapshot_seconds",
        HISTOGRAM,
        "Time to copy a model and to write the snapshot. Does the disk keep up?",
        lambda view: [((), view.counts.snapshots.taken)],
    ),
    Family(
        "pushstep_snapshot_interval_seconds",
        GAUGE,
        "How often a changing model is to be saved. What is the newest snapshot's age to be held against?",
        lambda view: [((), view.model.durability.snapshot_every_s)],
    ),
    Family(
        "pushstep_journal_records_total",
        COUNTER,
        "Records appended to the journal. Is it written?",
        lambda view: [((), view.counts.journal.records)],
    ),
    Family(
        "pushstep_journal_appended_bytes_total",
        COUNTER,
        "Bytes appended to the journal. How fast does it fill the disk?",
        lambda view: [((), view.counts.journal.appended_bytes)],
    ),
    Family(
        "pushstep_journal_file_bytes",
        GAUGE,
        "Bytes in the journal's present file. How long would a start replay?",
        lambda view: _journal(view, "file_bytes"),
    ),
    Family(
        "pushstep_journal_free_bytes",
        GAUGE,
        "Bytes that the disk has for more records, as last asked. How soon are pushes refused?",
        lambda view: _journal(view, "free_bytes"),
    ),
    Family(
        "pushstep_journal_sync_seconds",
        HISTOGRAM,
        "Time of each fsync of the journal. What does the level durable cost?",
        lambda view: [((), view.counts.journal.sync)] if view.counts.journal.records else [],
    ),
    Family(
        "pushstep_observer_dropped_total",
        COUNTER,
        "Events that observing hooks were too slow for. Is a hook's log complete?",
        lambda view: [((), view.model.observers.dropped)],
    ),
)


def views(models: Mapping[str, Model]) -> list[tuple[tuple[str], ModelView]]:
    """Each model, with its name as the label."""
    return [((name,), ModelView(model)) for name, model in sorted(models.items())]
