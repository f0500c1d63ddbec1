"""Logging: a record a line, as text or JSON, under the names of our modules, with the request that it concerns.

Loggers are the usual ``logging.getLogger(__name__)``: ``hedgerow.oip.service``, ``hedgerow_edge.agent``,
``hedgerow_cloud.fleet.service``. Libraries below us only speak up from WARNING on. Metrics are in `metrics`,
traces in `tracing`.
"""

import json
import logging
import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import IO, ClassVar, Final, Literal

from hedgerow.tensors import InferRequest

PACKAGES = ("hedgerow", "hedgerow_edge", "hedgerow_cloud")
"""The roots of our loggers."""
REPEATS = 5
"""Times that the same line is written within `REPEAT_WINDOW_S`; more are counted, and their number is said later."""
REPEAT_WINDOW_S = 30.0
MAX_LINES_KNOWN = 512
"""Different lines that are watched for repeats."""
MAX_ID_CHARS = 128
"""Of a caller's id in a line."""
MODEL: Final = "model"
REQUEST_ID: Final = "request_id"
ERROR_ID: Final = "error_id"
"""Name of what a record may bring as ``extra``: the id that a caller was given for an internal error."""

REQUEST: ContextVar[InferRequest | None] = ContextVar("request", default=None)
"""The request that is being worked on here."""


class LineFormatter(logging.Formatter):
    """``2026-11-24T21:20:00.123Z INFO hedgerow.oip.service message [digits 4711]``; a traceback has lines of its own.

    The brackets have the model and the id of the request that the record concerns, if it concerns one. Control
    characters in a message are escaped, because names in it may come from callers.
    """

    _escapes: ClassVar[dict[int, str]] = {code: f"\\x{code:02x}" for code in (*range(32), 127)}

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: ARG002, N802 (logging's)
        """RFC 3339, UTC, to the millisecond."""
        return _time(record)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """The record's line."""
        line, request = super().formatMessage(record), REQUEST.get()
        if request is not None:
            line += f" [{request.model[:MAX_ID_CHARS]} {_identity(request)}]"
        return line.translate(self._escapes)


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, logger, message, and, where there are such, the request's and error's ids.

    A traceback is in it too, so that a record is always one line.
    """

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        fields = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (request := REQUEST.get()) is not None:
            fields |= {MODEL: request.model[:MAX_ID_CHARS], REQUEST_ID: _identity(request)}
            if request.origin.traceparent:
                fields["traceparent"] = request.origin.traceparent
        if error_id := getattr(record, ERROR_ID, ""):
            fields[ERROR_ID] = error_id
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False)


class Repeats(logging.Filter):
    """Lets a line pass `REPEATS` times in `REPEAT_WINDOW_S`, and then says how many more there were.

    Only lines that are the same to the letter are repeats: an id in one makes it worth its own place.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lines: dict[tuple[str, int, str], tuple[float, int]] = {}
        """By logger, level and text: when its window began, and how often it came since."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        now, text = self._clock(), record.getMessage()
        key = record.name, record.levelno, text
        since, count = self._lines.get(key, (now, 0))
        if now - since >= REPEAT_WINDOW_S:
            if count > REPEATS:
                record.msg, record.args = (
                    f"{text} (and {count - REPEATS} times more in the last {now - since:.0f} s)",
                    (),
                )
            since, count = now, 0
        elif not count and len(self._lines) >= MAX_LINES_KNOWN:
            del self._lines[next(iter(self._lines))]
        self._lines[key] = since, count + 1
        return count < REPEATS


def configure_logging(
    level: str = "INFO", stream: IO[str] | None = None, *, form: Literal["text", "json"] = "text"
) -> None:
    """Send our records from `level` on, and everybody's warnings, to `stream` (standard error), and nowhere else."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else LineFormatter())
    handler.addFilter(Repeats())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(level)


def _identity(request: InferRequest) -> str:
    """The caller's id, or one that no other request has which is here at the same time."""
    return request.id[:MAX_ID_CHARS] or f"~{id(request):x}"


def _time(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"
