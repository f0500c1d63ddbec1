"""What the command line shows: tables or JSON on standard output, progress and errors on standard error.

Without a terminal, or with NO_COLOR, everything is plain text.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from hedgerow.config import variable

PLAIN_INTERVAL_S = 5.0
"""How often progress is said where it cannot be drawn."""

Advance = Callable[[int, int], None]
"""Takes what is done and what there is in all."""


MAX_WIDTH = 240
"""Columns of a table that goes into a file or a pipe."""
MAX_WHOLE = 24
"""Characters of a cell that is never broken; a terminal that is too narrow wraps the columns of longer ones."""


def say_json(value: object) -> None:
    """Print `value` as JSON on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def note(text: str) -> None:
    """A line beside the result."""
    print(text, file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """`text` without what could steer a terminal: much of what is shown was said by devices."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; numbers are set to the right. Columns are two spaces or more apart, which no cell has inside."""
    drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    lines = [[printable(str(cell)) for cell in row] for row in rows]
    for index, column in enumerate(columns):
        numeric = bool(lines) and all(line[index].replace(".", "").isdigit() for line in lines)
        whole = all(len(part) <= MAX_WHOLE for line in lines for part in line[index].split("\n"))
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=whole)
    for line in lines:
        drawn.add_row(*map(Text, line))  # as it is: strings would be taken for rich's markup
    console = Console(no_color=bool(variable("NO_COLOR")) or None, width=None if sys.stdout.isatty() else MAX_WIDTH)
    with console.capture() as capture:
        console.print(drawn)
    lines_out = (line.rstrip() for line in capture.get().splitlines())
    print("\n".join(line for line in lines_out if line))


def plain(message: Message) -> dict[str, Any]:
    """All fields of `message` as JSON has them: numbers as numbers, bytes left out."""
    result: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.type == FieldDescriptor.TYPE_BYTES:
            continue
        content = getattr(message, field.name)
        convert = plain if field.message_type is not None else _as_it_is
        result[field.name] = [convert(item) for item in content] if field.is_repeated else convert(content)
    return result


def _as_it_is(value: Any) -> Any:
    return value


def size(count: int) -> str:
    """A number of bytes for people."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} GiB"


@contextmanager
def progress(what: str, unit: str = "") -> Iterator[Advance]:
    """A progress bar on standard error, of bytes or of what `unit` counts; lines now and then where no bar can be."""
    if not _drawn():
        yield _plain_progress(what, unit)
        return
    counts = (MofNCompleteColumn(), TextColumn(unit)) if unit else (DownloadColumn(binary_units=True),)
    bar = Progress(TextColumn("{task.description}"), BarColumn(), *counts, console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A sign of life and the time that has passed, on standard error, for work whose length is not known."""
    if not _drawn():
        note(f"{what} …")
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as spinner:
        spinner.add_task(what, total=None)
        yield


def _drawn() -> bool:
    """Whether progress can be drawn."""
    return sys.stderr.isatty() and not variable("NO_COLOR")


def _plain_progress(what: str, unit: str) -> Advance:
    said = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= PLAIN_INTERVAL_S:
            said = time.monotonic()
            share = f" ({done / total:.0%})" if total else ""
            note(
                f"{what}: {done} of {total} {unit}{share}" if unit else f"{what}: {size(done)} of {size(total)}{share}"
            )

    return advance


def ago(unix_ms: int) -> str:
    """How long ago something was, for people."""
    seconds = max(0.0, time.time() - unix_ms / 1000)
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds / 86_400:.0f} days ago"


def rows_of(messages: Iterable[Message]) -> list[Mapping[str, Any]]:
    """`messages` for `say_json`."""
    return [plain(message) for message in messages]
