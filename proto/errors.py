"""The error catalogue: one class per failure, the same on both sides of the wire and at both doors.

    PushstepError
      InvalidRequest     the caller sent something that can never work; nothing was changed
      NotFound           the thing named does not exist
      Refused            the request is well-formed but not now, or not from this caller
      Unavailable        try again later, unchanged
      Broken             the server's own fault
      Misuse             raised on this side only, before anything was sent

A class carries its code (the machine-readable name, also over REST and in logs), its gRPC and HTTP status and a
message that says what to do. What fills the message travels beside it, so an error that crosses the wire comes
back as itself (see status.py). Nothing ever matches on message text.
"""

from __future__ import annotations

from typing import ClassVar

import grpc

Status = grpc.StatusCode


class PushstepError(Exception):
    """Any failure that pushstep names."""

    code: ClassVar[str] = ""
    grpc_status: ClassVar[grpc.StatusCode] = Status.UNKNOWN
    http_status: ClassVar[int] = 500
    template: ClassVar[str] = ""

    def __init__(self, message: str | None = None, **fields: object) -> None:
        self.fields: dict[str, str] = {name: str(value) for name, value in fields.items()}
        self.message = self.template.format(**fields) if message is None else message
        super().__init__(self.message)

    @property
    def consumed(self) -> bool:
        """Whether the push that failed took its sequence: its retry gets this error again."""
        return self.fields.get("consumed") == "True"

    @property
    def retry_after_s(self) -> float | None:
        """How long the server asks to wait before another attempt."""
        text = self.fields.get("retry_after_s")
        return None if text is None else float(text)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.fields))


def _rebuild(kind: type[PushstepError], message: str, fields: dict[str, str]) -> PushstepError:
    return kind(message, **fields)


class InvalidRequest(PushstepError):
    """The caller sent something that can never work; nothing was changed."""

    grpc_status = Status.INVALID_ARGUMENT
    http_status = 422


class MalformedFrame(InvalidRequest):
    """A message or stream that is not what the .proto says."""

    code = "malformed_frame"
    template = "malformed frame: {problem}"


class MalformedRequest(InvalidRequest):
    """Bytes on an HTTP connection that are no request."""

    code = "malformed_request"
    http_status = 400
    template = "malformed HTTP request: {problem}"


class NumberOutOfRange(InvalidRequest):
    """A number of a request that is NaN or outside of what its field may hold."""

    code = "number_out_of_range"
    template = "{what} is {got}; it must be from {least} to {most}"


class TooLong(InvalidRequest):
    """A text, bytes or a list of a request that is longer than its field may be."""

    code = "too_long"
    template = "{what} has {got} {unit}; it may have at most {most}"


class InvalidText(InvalidRequest):
    """A text with a character that cannot be shown: a control character, or half of one."""

    code = "invalid_text"
    template = "{what} holds the character {character}, which cannot be shown; leave it out"


class WrongLength(InvalidRequest):
    """A stream that carries more or fewer bytes than its header declares."""

    code = "wrong_length"
    template = "{what} is {got} bytes where {expected} were declared"


class WrongShape(InvalidRequest):
    """A tensor whose shape is not its parameter's."""

    code = "wrong_shape"
    template = "{what} has shape {got}, expected {expected}"


class WrongDtype(InvalidRequest):
    """An element type that cannot be used there."""

    code = "wrong_dtype"
    template = "{what} has dtype {got}, expected {expected}"


class InvalidManifest(InvalidRequest):
    """A description of a model that contradicts itself."""

    code = "invalid_manifest"
    template = "invalid manifest: {problem}"


class InvalidName(InvalidRequest):
    """A name of a model or worker that is not allowed."""

    code = "invalid_name"
    template = "{name!r} is no valid {what}: use 1 to 100 letters, digits, '.', '_' or '-', and begin with a letter or digit"


class InvalidHyperparameter(InvalidRequest):
    """A hyperparameter that the rule does not have or does not accept."""

    code = "invalid_hyperparameter"
    template = "{problem}"


class InvalidHook(InvalidRequest):
    """A hook, a point or settings that the catalogue does not have."""

    code = "invalid_hook"
    template = "{problem}"


class InvalidSettings(InvalidRequest):
    """A request body or setting that does not validate."""

    code = "invalid_settings"
    template = "{problem}"


class UnsupportedFormat(InvalidRequest):
    """An export format that does not exist."""

    code = "unsupported_format"
    template = "unknown format {got!r}; use one of: {known}"


class RangeNotSatisfiable(InvalidRequest):
    """A Range header that names nothing of what there is."""

    code = "range_not_satisfiable"
    grpc_status = Status.OUT_OF_RANGE
    http_status = 416
    template = "of {range!r} there is nothing: the content has {size} bytes"


class MessageTooLarge(InvalidRequest):
    """A message over the limit. Nothing of it was kept."""

    code = "message_too_large"
    grpc_status = Status.RESOURCE_EXHAUSTED
    http_status = 413
    template = "a message of {got} bytes is over the limit of {limit}; send smaller chunks"


class InvalidState(InvalidRequest):
    """Optimizer state that no step can have left, and that would break the next ones."""

    code = "invalid_state"
    template = (
        "{state!r} of {parameter!r} holds {got}: it is a sum or mean of squares, finite and not negative; nothing was "
        "changed"
    )


class NonfiniteGradient(InvalidRequest):
    """A gradient with NaN or infinity under `nonfinite = reject`."""

    code = "nonfinite_gradient"
    template = "the gradient of {parameter!r} holds NaN or infinity; the push was not applied (set nonfinite to skip or apply to change that)"


class RowOutOfRange(InvalidRequest):
    """A row id that the parameter does not have."""

    code = "row_out_of_range"
    template = "row {row} of {parameter!r} is out of range: it has {rows} rows"


class SparseNotSupported(InvalidRequest):
    """A row-sparse gradient for a group whose settings exclude it."""

    code = "sparse_not_supported"
    template = "{parameter!r} got a row-sparse gradient, but {problem}"


class NormOutlier(InvalidRequest):
    """A gradient whose norm is far above what the model's accepted pushes have had."""

    code = "norm_outlier"
    template = (
        "the gradient's norm is {norm}, accepted pushes had about {usual} and at most {limit} is let in; the push was "
        "not applied (PATCH the model's gate to change that)"
    )


class RejectedByHook(InvalidRequest):
    """A guard hook refused the push."""

    code = "rejected_by_hook"
    template = "hook {hook!r} rejected the push: {problem}"


class DigestMismatch(InvalidRequest):
    """The body that arrived is not the one whose digest was sent."""

    code = "digest_mismatch"
    grpc_status = Status.DATA_LOSS
    http_status = 422
    template = "the body's digest is {got}, the commit says {expected}; send the push again"


class NotFound(PushstepError):
    """The thing named does not exist."""

    grpc_status = Status.NOT_FOUND
    http_status = 404


class UnknownModel(NotFound):
    """No model of this name is held here."""

    code = "unknown_model"
    template = (
        "no model is named {model!r}; GET /v1/models lists them, and the first worker to attach creates one"
    )


class UnknownParameter(NotFound):
    """The model has no such parameter."""

    code = "unknown_parameter"
    template = "model {model!r} has no parameter {parameter!r}; GET /v1/models/{model}/parameters lists them"


class UnknownGroup(NotFound):
    """The model has no param group of this index."""

    code = "unknown_group"
    template = "model {model!r} has {groups} param groups; there is no group {group}"


class UnknownWorker(NotFound):
    """No worker of this name has joined the model."""

    code = "unknown_worker"
    template = "no worker {worker!r} has joined model {model!r}; join first"


class UnknownHook(NotFound):
    """The model has no hook of this id."""

    code = "unknown_hook"
    template = "model {model!r} has no hook {hook!r}; GET /v1/models/{model}/hooks lists them"


class UnknownSnapshot(NotFound):
    """The model has no snapshot of this id."""

    code = "unknown_snapshot"
    template = "model {model!r} has no snapshot {snapshot!r}; GET /v1/models/{model}/snapshots lists them"


class UnknownRoute(NotFound):
    """No resource lies at this path."""

    code = "unknown_route"
    template = "nothing at {method} {path}; /openapi.json lists every route"


class Refused(PushstepError):
    """The request is well-formed but not now, or not from this caller."""

    grpc_status = Status.FAILED_PRECONDITION
    http_status = 409


class MethodNotAllowed(Refused):
    """The resource has no such method."""

    code = "method_not_allowed"
    http_status = 405
    template = "{method} is not possible at {path}; /openapi.json lists every route"


class AlreadyJoined(Refused):
    """A live worker holds this name."""

    code = "already_joined"
    grpc_status = Status.ALREADY_EXISTS
    template = "worker {worker!r} is live for another {retry_after_s} s; wait, choose another name, or pass takeover=True"


class Fenced(Refused):
    """Another epoch of this worker took over, or an operator evicted it."""

    code = "fenced"
    template = "worker {worker!r} epoch {epoch} is fenced ({why}); a new session must be made by hand"


class LeaseExpired(Refused):
    """A worker that was silent for longer than its lease. Nobody took its name; it may join again."""

    code = "lease_expired"
    grpc_status = Status.ABORTED
    template = "worker {worker!r} was silent for more than {seconds} s and is out; join again"


class Quarantined(Refused):
    """A worker whose last pushes were all refused. Nothing of it is read until an operator releases it."""

    code = "quarantined"
    grpc_status = Status.PERMISSION_DENIED
    template = (
        "worker {worker!r} is quarantined after {count} refused pushes in a row; an operator can release it: "
        "POST /v1/models/{model}/workers/{worker}/release"
    )


class OutOfOrder(Refused):
    """A sequence that leaves a gap."""

    code = "out_of_order"
    template = "worker {worker!r} sent sequence {got} where {expected} is next"


class TooOld(Refused):
    """A sequence so old that its receipt is gone. It is never applied."""

    code = "too_old"
    template = "sequence {got} of worker {worker!r} is older than the receipts kept (from {oldest}); it was decided long ago"


class Conflict(Refused):
    """The same identity with another body."""

    code = "conflict"
    grpc_status = Status.ALREADY_EXISTS
    template = (
        "sequence {sequence} of worker {worker!r} was pushed before with another body; the first one stands"
    )


class Superseded(Refused):
    """A restore has ended the caller's timeline."""

    code = "superseded"
    grpc_status = Status.ABORTED
    template = "model {model!r} is on timeline {timeline} since a restore, the request came on {got}; join again and pull"


class ManifestChanged(Refused):
    """The model's manifest is not the one the caller knows."""

    code = "manifest_changed"
    grpc_status = Status.ABORTED
    template = "the manifest of model {model!r} changed; join again"


class ManifestMismatch(Refused):
    """A worker's model is not the server's."""

    code = "manifest_mismatch"
    template = "this worker's parameters differ from model {model!r}: {differences}"


class NoSharedMemory(Refused):
    """The server has no memory to share with this session, or no longer that which it names. Nothing was read."""

    code = "no_shared_memory"
    template = "no shared memory: {problem}; send frames instead"


class ModelLost(Refused):
    """The model that the caller knew is gone; one of the same name is another."""

    code = "model_lost"
    template = "model {model!r} as this session knew it is gone (deleted, or the server lost its data); it is never made anew by itself"


class ModelNotLoaded(ModelLost):
    """The model's files are there, and could not be loaded when the server started. Nothing of them was changed."""

    code = "model_not_loaded"
    template = (
        "model {model!r} was not loaded when the server started ({problem}); its files are kept as they were. Repair them "
        "and start the server again, or free the name: DELETE /v1/models/{model} puts the files aside"
    )


class ModelExists(Refused):
    """A model of this name exists."""

    code = "model_exists"
    grpc_status = Status.ALREADY_EXISTS
    template = "model {model!r} exists already"


class NoCreationTicket(Refused):
    """A creating upload without a valid ticket."""

    code = "no_creation_ticket"
    template = "no valid ticket to create model {model!r}; join again"


class StaleEtag(Refused):
    """If-Match names a state that is not the current one."""

    code = "stale_etag"
    grpc_status = Status.ABORTED
    http_status = 412
    template = "{what} changed since it was read: current ETag {etag}; read it again"


class VersionMoved(Refused):
    """A request for one version of a model that is at another by now."""

    code = "version_moved"
    template = (
        "model {model!r} is at version {version} of timeline {timeline}, and {asked} is not kept; take a snapshot to "
        "download a version that stays"
    )


class HeldByHook(Refused):
    """A hook decides this value."""

    code = "held_by_hook"
    template = (
        "{field!r} of group {group} is set by hook {hook!r} at every version; change or remove the hook"
    )


class OtherWorkersLive(Refused):
    """A replaced state dict would pull the rug from under live workers."""

    code = "other_workers_live"
    template = "{count} other workers are live ({workers}); pass force=True to replace the state for everyone"


class OverCapacity(Refused):
    """More than this server was told to hold."""

    code = "over_capacity"
    grpc_status = Status.RESOURCE_EXHAUSTED
    http_status = 409
    template = "{problem}; raise --{setting} or delete a model"


class HostNotAllowed(Refused):
    """A Host header that is not this server's: a page in a browser is behind it."""

    code = "host_not_allowed"
    grpc_status = Status.PERMISSION_DENIED
    http_status = 403
    template = "requests for host {host!r} are not answered here"


class Unavailable(PushstepError):
    """Try again later, unchanged."""

    grpc_status = Status.UNAVAILABLE
    http_status = 503


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


class TooManyInFlight(Unavailable):
    """A worker that sends further pushes before the earlier ones were decided."""

    code = "too_many_in_flight"
    grpc_status = Status.RESOURCE_EXHAUSTED
    template = "worker {worker!r} has {limit} pushes in flight; wait for their receipts"


class PushPending(Unavailable):
    """The push waits for other workers, as the policy says. Asking again is how to wait on."""

    code = "push_pending"
    template = "the push of worker {worker!r} waits for other workers under policy {policy}; ask again"


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


class Broken(PushstepError):
    """The server's own fault."""

    grpc_status = Status.INTERNAL
    http_status = 500


class InternalError(Broken):
    """A defect. The server's log has it under this id."""

    code = "internal_error"
    template = "the server failed (log id {log_id})"


class SnapshotDamaged(Broken):
    """A snapshot whose bytes are not the ones that were written. It is kept, and not loaded."""

    code = "snapshot_damaged"
    grpc_status = Status.DATA_LOSS
    template = "snapshot {snapshot!r} is damaged: {problem}"


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
    template = "cannot write {path}: it takes {need} bytes, the disk has {free} free ({problem})"


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


class Misuse(PushstepError):
    """Raised on this side only, before anything was sent."""

    grpc_status = Status.UNKNOWN
    http_status = 0


class ServerUnavailable(Misuse):
    """No server answers."""

    code = "server_unavailable"
    template = "no pushstep server answers at {address} within {seconds} s ({problem}); start one with: pushstep-server"


class NoAnswer(Misuse):
    """A step was retried for as long as allowed."""

    code = "no_answer"
    template = "no answer from {address} for {seconds} s ({problem}); the step may or may not have been taken: join again under the same name to find out"


class FateUnknown(Misuse):
    """Whether an in-doubt push was applied can no longer be known."""

    code = "fate_unknown"
    template = "the server no longer knows whether push {sequence} of worker {worker!r} was applied"


class LocalParameterEdit(Misuse):
    """A parameter was written to between steps."""

    code = "local_parameter_edit"
    template = "parameter {parameter!r} was changed here since the last step; the server has not seen it. Call session.upload() to send it"


class ForkedSession(Misuse):
    """A session that a fork carried into another process."""

    code = "forked_session"
    template = "this session was connected in process {parent}; a forked child must connect by itself"


class SessionClosed(Misuse):
    """A session that was closed."""

    code = "session_closed"
    template = "this session is closed; connect again"


class NotAttached(Misuse):
    """A call that needs an optimizer or a model first."""

    code = "not_attached"
    template = "{problem}"


class UnsupportedModule(Misuse):
    """A module or optimizer that cannot be handed to a server."""

    code = "unsupported_module"
    template = "{problem}"


def _leaves(kind: type[PushstepError]) -> list[type[PushstepError]]:
    return [kind] * bool(kind.code) + [leaf for child in kind.__subclasses__() for leaf in _leaves(child)]


CATALOGUE: dict[str, type[PushstepError]] = {kind.code: kind for kind in _leaves(PushstepError)}
