"""Errors that are raised on the caller's side alone, never by a server."""

from __future__ import annotations

from .base import Misuse


class ServerUnavailable(Misuse):
    """No server answers."""

    code = "server_unavailable"
    template = "no pushstep server answers at {address} after {seconds} s ({problem}); start one with: pushstep-server, or wait for one by connect(..., wait_s=60)"


class InvalidAddress(Misuse):
    """An address at which no server takes workers, and none will."""

    code = "invalid_address"
    template = "{address!r} is not where workers connect: {problem}"


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
    template = 'parameter {parameter!r} was changed here since the last step, and the server has not seen it: session.upload() sends the parameters as they are; with attach(..., edits="upload") each step sends such changes first'


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


class TokenNotSent(Misuse):
    """A token that anyone on the network could read."""

    code = "token_not_sent"
    template = (
        "the token was not sent to {address}: without TLS anyone on the way could read it. Pass tls=True or tls=TLS(ca=...), "
        "or insecure=True on a network that you trust"
    )


class TlsFailed(Misuse):
    """No secure connection to what listens at an address."""

    code = "tls_failed"
    template = "no connection to {address}: {problem}"
