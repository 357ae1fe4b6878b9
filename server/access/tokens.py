"""Bearer tokens: made, read from their sources, and looked up.

A source has a line for each token: a name, a role, `sha256:` and the token's hash (or the token itself, in a file of its
own or the environment), and perhaps the models that it is for, and `worker=` and the workers' names that it is for. A token has 256 random bits, so one pass of SHA-256
protects it. What is kept in memory is the hash. It is found through an index that is keyed anew in each process, so the
time of a look-up tells nothing about the hashes; the hash that was found is compared in constant time. Either takes the
same time however many tokens there are.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from .caller import Caller
from .roles import Role

HASHED: Final = "sha256:"
WORKER: Final = "worker="
SHORTEST: Final = 20
LONGEST: Final = 512
MOST_TOKENS: Final = 100_000
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PATTERN: Final = re.compile(r"[A-Za-z0-9._\-*?\[\]!]{1,100}")
# The characters of a bearer token (RFC 6750).
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Token:
    """One line of a source, without the token itself."""

    name: str
    role: Role
    models: tuple[str, ...]
    digest: bytes = field(repr=False)
    workers: tuple[str, ...] = ()


def made_token() -> str:
    """A new token."""
    return f"pushstep-{secrets.token_urlsafe(32)}"


def line_of(token: str, name: str, role: Role, models: str = "", workers: str = "") -> str:
    """The line that lets a token in, with its hash. ValueError for a name, or lists, that no line can have."""
    words = [name, role.value, HASHED + digest_of(token).hex()]
    words += [*([models] if models else []), *([WORKER + workers] if workers else [])]
    line = " ".join(words)
    if line.split() != words:
        raise ValueError("a name, and a list of models or workers, has no spaces")
    _parsed(line, hashed_only=True)
    return line


def digest_of(token: str) -> bytes:
    """A token's hash."""
    return hashlib.sha256(token.encode()).digest()


def read_tokens(lines: Iterable[str], source: str, *, hashed_only: bool = False) -> Iterator[Token]:
    """The tokens of a source. Empty lines and those that begin with # are passed over.

    ValueError, which never shows more of a line than its number. `hashed_only`: no line may have a token itself.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            yield _parsed(line, hashed_only=hashed_only)
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: {error}") from None


def _parsed(line: str, *, hashed_only: bool) -> Token:
    words = line.split()
    workers = _patterns(words.pop().removeprefix(WORKER)) if words[-1].startswith(WORKER) else ()
    if len(words) not in (3, 4):
        raise ValueError(
            "a token is NAME ROLE sha256:HASH, and perhaps MODELS, such as flights,test-*, and worker=NAMES"
        )
    name, role, secret = words[:3]
    if not _NAME.fullmatch(name):
        raise ValueError("the first word is no name of at most 100 letters, digits, '.', '_' and '-'")
    if role not in tuple(Role):
        raise ValueError(f"the second word is no role: {', '.join(Role)}")
    models = _patterns(words[3]) if len(words) == 4 else ()
    if models is None:
        raise ValueError("the fourth word is no list of models' names or patterns, such as flights,test-*")
    if workers is None:
        raise ValueError(f"behind {WORKER} there is no list of workers' names or patterns, such as w0,gpu-*")
    if workers and role != Role.WORKER:
        raise ValueError(f"{WORKER} is for the role {Role.WORKER.value}: nobody else is a worker")
    return Token(name, Role(role), models, _digest(secret, hashed_only=hashed_only), workers)


def _patterns(word: str) -> tuple[str, ...] | None:
    """Names or patterns between commas; None if one is neither."""
    found = tuple(word.split(","))
    return found if all(map(_PATTERN.fullmatch, found)) else None


def _digest(secret: str, *, hashed_only: bool) -> bytes:
    if secret.startswith(HASHED):
        if not _DIGEST.fullmatch(secret.removeprefix(HASHED)):
            raise ValueError(f"{HASHED} is followed by 64 hexadecimal digits")
        return bytes.fromhex(secret.removeprefix(HASHED))
    if hashed_only:
        raise ValueError(f"settings have hashes, not tokens: {HASHED} and what --make-token prints")
    if not SHORTEST <= len(secret) <= LONGEST or not _TOKEN.fullmatch(secret):
        raise ValueError(
            f"a token has {SHORTEST} to {LONGEST} letters, digits and '._~+/-': --make-token makes one"
        )
    return digest_of(secret)


class Tokens:
    """The known tokens, by their hash. Used on the event loop only."""

    def __init__(self, tokens: Iterable[Token]) -> None:
        self._key = secrets.token_bytes(32)
        self._known: dict[bytes, tuple[Token, Caller]] = {}
        # what an unknown token is compared with
        self._nothing = bytes(32)
        self.replace(tokens)

    def __len__(self) -> int:
        return len(self._known)

    def caller(self, token: str) -> Caller | None:
        """The holder of a token; None if it is not known."""
        digest = digest_of(token)
        found = self._known.get(self._place(digest))
        expected = self._nothing if found is None else found[0].digest
        is_same = hmac.compare_digest(digest, expected)
        return found[1] if found is not None and is_same else None

    def _place(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._key, digest_size=16).digest()

    def replace(self, tokens: Iterable[Token]) -> list[Caller]:
        """Know these tokens and no others. Returns who is not let in any more, or not as before.

        ValueError for one token twice; then nothing changes.
        """
        known: dict[bytes, tuple[Token, Caller]] = {}
        for token in tokens:
            place = self._place(token.digest)
            if place in known:
                raise ValueError(f"{known[place][0].name!r} and {token.name!r} are the same token")
            kept = self._known.get(place)
            if kept is not None and kept[0] == token:
                known[place] = kept
            else:
                known[place] = token, Caller(token.name, token.role, token.models, token.workers)
        if len(known) > MOST_TOKENS:
            raise ValueError(f"there are more than {MOST_TOKENS} tokens")
        gone = [
            caller for place, (_, caller) in self._known.items() if _caller_at(known, place) is not caller
        ]
        self._known = known
        return gone


def _caller_at(known: Mapping[bytes, tuple[Token, Caller]], place: bytes) -> Caller | None:
    found = known.get(place)
    return None if found is None else found[1]
