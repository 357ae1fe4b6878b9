"""Errors of the catalogue, as ranks say them to each other."""

from __future__ import annotations

import logging

from pushstep.proto.errors import CATALOGUE, InternalError, PushstepError
from pushstep.proto.errors.status import named
from pushstep.proto.shards_pb2 import RankError

log = logging.getLogger("pushstep.ranks")


def said(error: Exception) -> RankError:
    """An error as a message."""
    known = named(error, log)
    return RankError(code=known.code, message=known.message, fields=known.fields)


def heard(message: RankError) -> PushstepError:
    """The error that a rank has said."""
    kind = CATALOGUE.get(message.code, InternalError)
    return kind(message.message, **dict(message.fields))
