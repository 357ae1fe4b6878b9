"""Errors of things that do not exist, and of requests that are refused now or to this caller."""

from __future__ import annotations

from .base import NotFound, Refused, Status


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


class VersionNotKept(NotFound):
    """No snapshot holds this version, and no journal reaches it."""

    code = "version_not_kept"
    template = (
        "version {version} of model {model!r} is in no snapshot, nor in the journal behind one; "
        "GET /v1/models/{model}/snapshots lists the snapshots"
    )


class UnknownRoute(NotFound):
    """No resource lies at this path."""

    code = "unknown_route"
    template = "nothing at {method} {path}; /openapi.json lists every route"


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
    """A worker whose last pushes were all refused, or that an operator has quarantined. Nothing of it is read until one releases it."""

    code = "quarantined"
    grpc_status = Status.PERMISSION_DENIED
    template = "worker {worker!r} is quarantined ({why}); an operator can release it: POST /v1/models/{model}/workers/{worker}/release"


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
    template = "sequence {sequence} of worker {worker!r} was pushed before with another body, which stands"


class Superseded(Refused):
    """A restore has ended the caller's timeline."""

    code = "superseded"
    grpc_status = Status.ABORTED
    template = "model {model!r} is on timeline {timeline} since a restore, the request came on {got}; join again and pull"


class RolledBack(Superseded):
    """A crash of the server, or the repair of its files, has undone versions that this worker was told of."""

    code = "rolled_back"
    template = (
        "a crash of the server has undone {versions} versions of model {model!r} that this worker was told of: it goes on "
        "from version {version} (timeline {timeline})"
    )


class ManifestChanged(Refused):
    """The model's manifest is not the one the caller knows."""

    code = "manifest_changed"
    grpc_status = Status.ABORTED
    template = "the manifest of model {model!r} changed; join again"


class MapChanged(Refused):
    """The model lies in other ranks, or is cut in another way, than the caller knows."""

    code = "map_changed"
    grpc_status = Status.ABORTED
    template = "the parts of model {model!r} lie elsewhere than the caller knows; join again"


class NotInRanks(Refused):
    """Not possible, or not yet, for a model that lies in several ranks."""

    code = "not_in_ranks"
    template = "model {model!r} lies in {ranks} ranks, where this is not possible: {what}"


class NotTheCoordinator(Refused):
    """Only rank 0 decides. The other ranks take pushes' parts, and answer pulls of theirs."""

    code = "not_the_coordinator"
    template = "this is rank {rank}, which holds a part of each model: {what} goes to rank 0"


class RanksDiffer(Refused):
    """A rank that does not fit the others: of another job, build or number, or a number that another has."""

    code = "ranks_differ"
    template = "rank {rank} does not fit in: {problem}"


class ManifestMismatch(Refused):
    """A worker's model is not the server's."""

    code = "manifest_mismatch"
    template = (
        "this worker's parameters differ from model {model!r}: {differences}. Run the code that the model was made with, "
        "or train another model: connect(..., model=...) with a name of its own"
    )


class NoSharedMemory(Refused):
    """The server shares no memory with this session, or no longer what it names. Nothing was read."""

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
    template = "{field!r} of group {group} is set by hook {hook!r} at every version; change or remove it"


class MissingExtra(Refused):
    """Something needs a package that is not installed where the server runs."""

    code = "missing_extra"
    template = (
        "{what} needs {package}, which this server does not have: pip install 'pushstep[{extra}]' there"
    )


class OtherWorkersLive(Refused):
    """A replaced state dict would change the model under other live workers."""

    code = "other_workers_live"
    template = "{count} other workers are live ({workers}); pass force=True to replace the state for everyone"


class WorkersLive(Refused):
    """An operator's new param group would be unknown to the loops of live workers."""

    code = "workers_live"
    template = (
        "{count} workers of model {model!r} are live ({workers}): attached optimizers would stop with manifest_mismatch at "
        "their next step, until their loops add the same group; force=true adds it all the same"
    )


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


class SnapshotsOwned(Refused):
    """The snapshots at a URL are another server's. Two servers would remove each other's."""

    code = "snapshots_owned"
    template = (
        "the snapshots at {store} are those of {owner}; choose another URL, or, if that server is gone for ever, start with "
        "--snapshots-takeover"
    )


class Unauthenticated(Refused):
    """The request came without a token that is known here."""

    code = "unauthenticated"
    grpc_status = Status.UNAUTHENTICATED
    http_status = 401
    template = (
        "{problem}: connect(..., token=...) and the commands take one, also from PUSHSTEP_TOKEN; over REST it is "
        "'Authorization: Bearer TOKEN'"
    )


class TokenRevoked(Refused):
    """The request's token was taken back while it was under way. Nothing that was not complete counts."""

    code = "token_revoked"
    grpc_status = Status.UNAUTHENTICATED
    http_status = 401
    template = (
        "the token {name!r} was revoked, or its rights were changed, while it was in use: connect again"
    )


class PermissionDenied(Refused):
    """The token is known, and is not for this."""

    code = "permission_denied"
    grpc_status = Status.PERMISSION_DENIED
    http_status = 403
    template = "{problem} (needed: {need})"


class TooManyAttempts(Refused):
    """Too many requests without a right token came from this address."""

    code = "too_many_attempts"
    grpc_status = Status.RESOURCE_EXHAUSTED
    http_status = 429
    template = "too many requests without a right token came from this address: come with one, or in {retry_after_s} s"
