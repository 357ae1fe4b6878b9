"""Lets callers in by the table: the one decision behind both doors.

Without a source of tokens the guard is open, for as long as the server runs: everyone may do everything. With one, also an
empty one, nobody is let in without a token, whatever the transport.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Final

from pushstep.proto.errors import PushstepError, TooManyAttempts, Unauthenticated

from .attempts import Attempts
from .caller import CALLER, Caller
from .roles import Need
from .tokens import LONGEST, Token, Tokens

log = logging.getLogger("pushstep.access")
SCHEME: Final = "bearer"


class Guard:
    """The tokens that are known, and the refusals."""

    def __init__(self, tokens: Iterable[Token] | None) -> None:
        """`tokens` None: the doors are open."""
        self.is_open = tokens is None
        self._tokens = Tokens(tokens or ())
        self._attempts = Attempts()

    def admit(self, need: Need, authorizations: list[str], what: str) -> Caller | None:
        """Let a request in, and make its caller this context's. None for nobody in particular.

        `authorizations`: the request's Authorization fields. Unauthenticated, PermissionDenied; have `refusal` count them.
        """
        if self.is_open or need is Need.OPEN:
            return None
        caller = self._caller(authorizations)
        caller.require(need, what)
        caller.begins()
        CALLER.set(caller)
        return caller

    def _caller(self, authorizations: list[str]) -> Caller:
        if not authorizations:
            raise Unauthenticated(problem="no token came with the request")
        scheme, _, token = authorizations[0].partition(" ")
        token = token.strip(" ")
        if len(authorizations) > 1 or scheme.lower() != SCHEME or not token or len(token) > LONGEST:
            raise Unauthenticated(problem="the Authorization field is not Bearer and one token")
        caller = self._tokens.caller(token)
        if caller is None:
            raise Unauthenticated(problem="the token is not known here, or not any more")
        return caller

    def refusal(self, error: PushstepError, address: str) -> PushstepError:
        """What an address is told in place of `error`: TooManyAttempts if it has come too often without a right token."""
        if not isinstance(error, Unauthenticated):
            return error
        wait_s = self._attempts.wait_s(address)
        return TooManyAttempts(retry_after_s=round(wait_s, 3)) if wait_s else error

    def replace(self, tokens: Iterable[Token]) -> None:
        """Know these tokens and no others; end what the others have under way. ValueError, and nothing changes."""
        if self.is_open:
            return
        gone = self._tokens.replace(tokens)
        cut = sum(caller.revoke() for caller in gone)
        names = ", ".join(sorted({caller.name for caller in gone})) or "none"
        log.info("%d tokens are known; revoked: %s; calls cut: %d", len(self._tokens), names, cut)
