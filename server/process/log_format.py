"""The two forms of a line of the log: text for people, and one JSON object for machines that collect logs.

In both a line is one line: whatever a name or an error's text holds, it begins no line of its own. The text of a traceback is
indented, so none of its lines looks like one of the log's. Fields come with a record (`extra=`): the model, the worker, the
sequence of its push, the code of the error, and the trace.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Final

TEXT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"
FIELDS: Final = ("model", "worker", "sequence", "code", "trace_id")
INDENT: Final = "    "


def one_line(text: str) -> str:
    """The text without line breaks, control characters, and whatever else no terminal shows: these are escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class TextFormat(logging.Formatter):
    """Time, level, logger, message."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line itself."""
        return one_line(super().formatMessage(record).rstrip())

    def formatException(self, ei: Any) -> str:
        """A traceback, each line of it indented."""
        return "\n".join(INDENT + one_line(line) for line in super().formatException(ei).split("\n"))

    def formatStack(self, stack_info: str) -> str:
        """A stack, each line of it indented."""
        return "\n".join(INDENT + one_line(line) for line in stack_info.split("\n"))

    def plain(self, text: str) -> str:
        """A line that is no record, such as the last one of a server that does not start."""
        return one_line(text)


class JsonFormat(logging.Formatter):
    """One object per line: time, level, logger, message, the fields that are known, and a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().rstrip(),
        }
        line |= {name: record.__dict__[name] for name in FIELDS if record.__dict__.get(name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        return json.dumps(line, default=str)

    def plain(self, text: str) -> str:
        """A line that is no record, as one."""
        return self.format(
            logging.makeLogRecord({"name": "pushstep.server", "msg": text, "levelname": "ERROR"})
        )


Format = TextFormat | JsonFormat
FORMATS: Final[dict[str, type[Format]]] = {"text": TextFormat, "json": JsonFormat}
