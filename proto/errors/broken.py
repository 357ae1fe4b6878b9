"""Errors after which the same request may be sent again later, and errors that are the server's own fault."""

from __future__ import annotations

from .base import Broken, Status, Unavailable


class Draining(Unavailable):
    """The server is stopping."""

    code = "draining"
    template = "the server is stopping and takes no new work"


class Starting(Unavailable):
    """The server has not brought back its models yet: whether it has one is not known."""

    code = "starting"
    template = "the server is starting and still brings back its models; try again"


class BeingCreated(Unavailable):
    """Another worker is uploading the model right now."""

    code = "being_created"
    template = "model {model!r} is being created by worker {worker!r}; try again"


class OverBudget(Unavailable):
    """Too many bytes are in flight."""

    code = "over_budget"
    grpc_status = Status.RESOURCE_EXHAUSTED
    http_status = 503
    template = "{need} bytes are needed and {free} of the {budget} of --{setting} are free; try again"


class MemoryShort(Unavailable):
    """The budget has room for a push, and the machine has no memory for it now."""

    code = "memory_short"
    grpc_status = Status.RESOURCE_EXHAUSTED
    template = "the server has no memory for the {need} bytes of the push now; try again"


class JournalFull(Unavailable):
    """The disk has no room for the record of a push. Nothing was decided; pulls are answered."""

    code = "journal_full"
    grpc_status = Status.RESOURCE_EXHAUSTED
    template = (
        "the disk has {free} bytes free, which do not hold the record of a push to model {model!r} ({need} bytes): it is "
        "taken once there is room"
    )


class TooManyInFlight(Unavailable):
    """A worker that sends further pushes before the earlier ones were decided."""

    code = "too_many_in_flight"
    grpc_status = Status.RESOURCE_EXHAUSTED
    template = "worker {worker!r} has {limit} pushes in flight; wait for their receipts"


class PushPending(Unavailable):
    """The push waits for other workers, as the policy says. Asking again is how to wait on."""

    code = "push_pending"
    template = "the push of worker {worker!r} waits under policy {policy}: {why}; ask again"


class NotHeld(Unavailable):
    """A retry without a body of a push that is not, or no longer, waiting here."""

    code = "not_held"
    template = "push {sequence} of worker {worker!r} is not held here; send it whole"


class StreamStalled(Unavailable):
    """A stream on which nothing has moved for too long. What it had sent is forgotten."""

    code = "stream_stalled"
    grpc_status = Status.ABORTED
    http_status = 408
    template = "nothing arrived on the stream for {seconds} s; send the push again"


class RequestTimeout(Unavailable):
    """A request that took too long to arrive."""

    code = "request_timeout"
    grpc_status = Status.ABORTED
    http_status = 408
    template = "the {what} of the request did not arrive within {seconds} s; send it again"


class Busy(Unavailable):
    """Too many calls of one kind are under way already."""

    code = "busy"
    grpc_status = Status.RESOURCE_EXHAUSTED
    template = "{waiting} {what} are under way already; try again"


class ReaderStalled(Unavailable):
    """A reader that takes nothing of its answer. What was kept for it is let go of."""

    code = "reader_stalled"
    grpc_status = Status.ABORTED
    http_status = 408
    template = "nothing of the answer was taken for {seconds} s; ask again"


class ExportsBusy(Unavailable):
    """Copies of other models or versions, for exports or states, hold the memory or disk set aside for them."""

    code = "exports_busy"
    template = "{count} copies of other models or versions are being written or sent; try again"


class VersionGone(Unavailable):
    """The exact version of a part that was asked for is not kept there."""

    code = "version_gone"
    template = "version {version} of model {model!r} is not kept in rank {rank}; pull from rank 0 again"


class RankLost(Unavailable):
    """A rank of the job is gone, so nothing can be decided. All ranks stop, and are started again."""

    code = "rank_lost"
    template = "rank {rank} is gone ({problem}): all ranks stop; try again once they are back"


class InternalError(Broken):
    """A defect. The server's log has it under this id."""

    code = "internal_error"
    template = "the server failed (log id {log_id})"


class SnapshotDamaged(Broken):
    """A snapshot whose bytes are not the ones that were written. It is kept, and not loaded."""

    code = "snapshot_damaged"
    grpc_status = Status.DATA_LOSS
    template = "snapshot {snapshot!r} is damaged: {problem}"


class JournalDamaged(Broken):
    """A journal of which a record that was on the disk has other bytes, or is missing. It is kept, and not replayed."""

    code = "journal_damaged"
    grpc_status = Status.DATA_LOSS
    template = (
        "record {record} of the journal of model {model!r} is damaged ({file}: {problem}); `pushstep check` shows what is "
        "there, and `pushstep check --repair` cuts the journal off in front of that record"
    )


class SnapshotUnsupported(Broken):
    """A snapshot that is whole, and that this build cannot load. It is kept; an older one is not taken for it."""

    code = "snapshot_unsupported"
    template = "snapshot {snapshot!r} is whole, but this build cannot load it: {problem}"


class StorageFailed(Broken):
    """The disk refused."""

    code = "storage_failed"
    template = "cannot write {path}: {problem}"


class DiskFull(StorageFailed):
    """The disk has no room, or files may not be that large. What was written of it is gone again."""

    code = "disk_full"
    grpc_status = Status.RESOURCE_EXHAUSTED
    http_status = 507
    template = "cannot write {path}: it takes {need} bytes, the disk has {free} free ({problem})"


class SnapshotsAway(Unavailable):
    """The store that `--snapshots` names does not answer, or refuses. The model trains on."""

    code = "snapshots_away"
    template = "the snapshots' store {store} does not do what is asked: {problem}"


class OutOfMemory(Broken):
    """The machine, or the device, has no memory for it. What was taken of it is given back."""

    code = "out_of_memory"
    grpc_status = Status.RESOURCE_EXHAUSTED
    template = "no memory for {what}: {need} bytes could not be had"


class ModelFailed(Broken):
    """A step broke off half way: the model takes nothing more until a snapshot is restored."""

    code = "model_failed"
    template = "a step of model {model!r} failed at version {version} ({problem}); restore a snapshot"


class StepFailed(Broken):
    """A step that could not be taken. Nothing of it was applied, and the model goes on."""

    code = "step_failed"
    template = (
        "the step to version {version} of model {model!r} failed ({problem}): nothing of it was applied"
    )
