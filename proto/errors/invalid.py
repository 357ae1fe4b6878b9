"""Errors of requests that can never work: the caller sent something that is not as it has to be."""

from __future__ import annotations

from .base import InvalidRequest, Status


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
    """A text with a character that cannot be shown: a control character, or half of a character."""

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


class InvalidFile(InvalidRequest):
    """A file with a model's values that is none, or not this model's."""

    code = "invalid_file"
    template = "the file was not taken: {problem}; nothing was changed"


class LengthRequired(InvalidRequest):
    """A file that is sent without saying how long it is."""

    code = "length_required"
    http_status = 411
    template = "a file is sent with its Content-Length, so that room for it can be set aside first"


class UnsupportedEncoding(InvalidRequest):
    """A body over HTTP that is compressed. None is unpacked: a small one could hold any number of bytes."""

    code = "unsupported_encoding"
    http_status = 415
    template = "a body with Content-Encoding {got!r} is not taken: send it as it is, without that field"


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
    template = "a message of {got} bytes is over the limit of {limit}; send it in smaller parts"


class InvalidState(InvalidRequest):
    """Optimizer state that no step can have left, and that would break the next ones."""

    code = "invalid_state"
    template = (
        "{state!r} of {parameter!r} holds {got}: it is a sum or mean of squares, finite and not negative; nothing was "
        "changed"
    )


class NonfiniteParameter(InvalidRequest):
    """Values with NaN or infinity in a file that is imported."""

    code = "nonfinite_parameter"
    template = "the values of {parameter!r} hold NaN or infinity; nothing was changed"


class NonfiniteGradient(InvalidRequest):
    """A gradient with NaN or infinity under `nonfinite = reject`."""

    code = "nonfinite_gradient"
    template = "the gradient of {parameter!r} holds NaN or infinity; the push was not applied. Look for the cause where the loss is computed, or have such pushes left out: `pushstep gate MODEL --set nonfinite=skip`"


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
    template = "the gradient's norm is {norm}, accepted pushes had about {usual} and at most {limit} is let in; the push was not applied (`pushstep gate MODEL --set norm_outlier=null` lets such norms in)"


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
