"""How a server's process ends."""

from __future__ import annotations

import logging
import os
from enum import IntEnum
from typing import NoReturn

log = logging.getLogger("pushstep.service")


class ExitStatus(IntEnum):
    """How a server's process ended. docs/operators.md has the same table."""

    SAVED = 0
    NOT_STARTED = 1
    BAD_SETTINGS = 2
    NOT_ALL_SAVED = 3
    BROKEN_OFF = 4
    DISK_FAILED = 5
    RANK_LOST = 6


def disk_failed(model: str, error: Exception) -> NoReturn:
    """End the process, without another write or word to anyone: the disk has refused what was to be made durable.

    A second fsync would report success, although the kernel has dropped what the first one could not write.
    """
    log.critical(
        "the journal of model %s could not be forced to the disk (%s): this server ends now; start it again once the disk "
        "is well, and it goes on from what is there",
        model,
        error,
    )
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(ExitStatus.DISK_FAILED)


def rank_lost(error: Exception) -> NoReturn:
    """End the process, without another write: a rank of its job is gone, and what the others have can only be settled anew."""
    log.critical("%s", error)
    for handler in logging.getLogger().handlers:
        handler.flush()
    os._exit(ExitStatus.RANK_LOST)
