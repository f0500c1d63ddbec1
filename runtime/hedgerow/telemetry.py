"""Logging: one line of text a record, under the names of our modules.

Loggers are the usual ``logging.getLogger(__name__)``: ``hedgerow.service``, ``hedgerow_edge.agent``,
``hedgerow_cloud.fleet.service``. Libraries below us only speak up from WARNING on.
"""

import logging
import sys
import time
from typing import IO, ClassVar

PACKAGES = ("hedgerow", "hedgerow_edge", "hedgerow_cloud")
"""The roots of our loggers."""


class LineFormatter(logging.Formatter):
    """``2026-11-24T21:20:00.123Z INFO hedgerow.service message``; a traceback follows on lines of its own.

    Control characters in a message are escaped, because names in it may come from callers.
    """

    _escapes: ClassVar[dict[int, str]] = {code: f"\\x{code:02x}" for code in (*range(32), 127)}

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002, N802 (logging's)
        """RFC 3339, UTC, to the millisecond."""
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """The record's line."""
        return super().formatMessage(record).translate(self._escapes)


def configure_logging(level: str = "INFO", stream: IO[str] | None = None) -> None:
    """Send our records from `level` on, and everybody's warnings, to `stream` (standard error), and nowhere else."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(level)
