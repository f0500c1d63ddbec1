"""Lines of the log: whom they concern, and how many there may be."""

import io
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from msgspec.structs import replace
from simulators import models
from simulators.cloud import MODEL
from simulators.devices import ask, large_model

from hedgerow import transports
from hedgerow.config import ServerSettings
from hedgerow.errors import HedgerowError
from hedgerow.function import FunctionBackend
from hedgerow.server import Server
from hedgerow.telemetry.logs import ERROR_ID, REPEAT_WINDOW_S, REPEATS, REQUEST, JsonFormatter, LineFormatter, Repeats
from hedgerow.tensors import InferResponse, Origin


@contextmanager
def logged(formatter: logging.Formatter, logger: str = "hedgerow") -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logging.getLogger(logger).addHandler(handler)
    yield stream
    logging.getLogger(logger).removeHandler(handler)


class Crashing(FunctionBackend):
    """Fails where nobody expects it, so that its error is an internal one."""

    async def infer(self, *_: Any) -> InferResponse:
        raise ZeroDivisionError("unexpected")


@pytest.mark.parametrize("transport", transports.known())
async def test_the_line_of_an_internal_error_names_the_error_and_the_request(transport: str) -> None:
    request = models.request(model=MODEL)
    with logged(JsonFormatter()) as stream:
        async with Server(Crashing(large_model()), ServerSettings(port=0, transport=transport)) as server:
            with pytest.raises(HedgerowError, match="internal error") as caught:
                await ask(server, replace(request, id="of mine"))
    identity = re.search(r"internal error (\w+)", str(caught.value))
    assert identity is not None
    (line,) = [json.loads(line) for line in stream.getvalue().splitlines() if identity[1] in line]
    assert line["model"] == MODEL
    assert line["request_id"] == "of mine"
    assert "ZeroDivisionError: unexpected" in line["traceback"]
    assert line["level"] == "ERROR"
    assert line["error_id"] == identity[1]


def record(text: str, *arguments: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("hedgerow.test", logging.WARNING, __file__, 1, text, arguments, None)
    made.__dict__.update(extra)
    return made


@pytest.mark.parametrize(
    ("identity", "seen"), [("4711", "4711"), ("", r"~[0-9a-f]+"), ("x\n2026 INFO forged", r"x\\x0a2026 INFO forged")]
)
def test_a_line_names_the_request_that_it_concerns(identity: str, seen: str) -> None:
    token = REQUEST.set(replace(models.request(), id=identity, origin=Origin(traceparent="00-ab-cd-01")))
    try:
        text = LineFormatter().format(record("no room for %s", "it"))
        fields = json.loads(JsonFormatter().format(record("no room", **{ERROR_ID: "e1"})))
    finally:
        REQUEST.reset(token)
    assert re.fullmatch(rf"\S+ WARNING hedgerow.test no room for it \[digits {seen}\]", text.replace("\\", "\\"))
    assert fields["message"] == "no room"
    assert fields["traceparent"] == "00-ab-cd-01"
    assert fields["error_id"] == "e1"
    if identity:
        assert fields["request_id"] == identity


def test_without_a_request_a_line_is_as_it_was() -> None:
    assert LineFormatter().format(record("all is well")).endswith("WARNING hedgerow.test all is well")
    assert set(json.loads(JsonFormatter().format(record("all is well")))) == {"time", "level", "logger", "message"}


def test_the_same_line_over_and_over_is_left_out_and_counted_and_others_are_not() -> None:
    now = 0.0
    repeats = Repeats(lambda: now)
    passed = [repeats.filter(record("the disk is %s", "full")) for _ in range(REPEATS + 10)]
    assert passed == [True] * REPEATS + [False] * 10
    assert repeats.filter(record("the disk is %s", "slow"))
    now = REPEAT_WINDOW_S
    again = record("the disk is %s", "full")
    assert repeats.filter(again)
    assert again.getMessage() == f"the disk is full (and 10 times more in the last {REPEAT_WINDOW_S:.0f} s)"


def test_ever_new_lines_do_not_fill_the_memory() -> None:
    repeats = Repeats()
    for number in range(5000):
        assert repeats.filter(record("request %d", number))
    assert len(repeats._lines) <= 512
