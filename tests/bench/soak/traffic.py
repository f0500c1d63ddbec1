"""The mixed traffic of a device's day: kinds of requests, what each may meet, and the Poisson process that sends them.

Every answer is judged: class k answers to pixel k, whoever gives it, so an answer of the wrong class is a failure, and
so is any status that the kind does not allow.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import grpc
import numpy as np
from bench.serving.openloop import Alarm
from bench.serving.wire import Grpc
from bench.soak.stage import LARGE, LARGE_ELEMENTS, MODEL
from bench.soak.tally import Tally
from numpy.typing import NDArray
from simulators.models import CLASSES, FEATURES

from hedgerow.proto import oip_pb2

MAX_INFLIGHT = 500
"""Requests of the Poisson process; more are not sent, and counted."""
PATIENCE_S = 10.0
"""The deadline of those that are in no hurry: the machine may stand still for a while."""
HURRY_S = 0.0005
"""The deadline of those that nearly always are too late."""
CANCEL_WITHIN_S = 0.004
ROWS = 16
FAINT = 0.05
"""A pixel that leaves the device's model unsure, and the cloud's not."""

Call = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
Status = grpc.StatusCode


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of one kind: how many of all, as prepared bytes one for each class, and what they may meet."""

    name: str
    weight: float
    bodies: tuple[bytes, ...]
    rows: int = 1
    timeout_s: float = PATIENCE_S
    cancelled: bool = False
    allowed: frozenset[Status] = frozenset({Status.OK})


def message(model: str, array: NDArray[np.float32], *, name: str = "pixels", **parameters: str) -> bytes:
    """A request in the protocol."""
    request = oip_pb2.ModelInferRequest(model_name=model, raw_input_contents=[array.tobytes()])
    request.inputs.add(name=name, datatype="FP32", shape=array.shape)
    for key, value in parameters.items():
        request.parameters[key].string_param = value
    return request.SerializeToString()


def pixels(k: int, value: float = 1.0, rows: int = 1) -> NDArray[np.float32]:
    """What belongs to class `k`: shape (rows, FEATURES)."""
    array = np.zeros((rows, FEATURES), np.float32)
    array[:, k] = value
    return array


def large_message(**parameters: str) -> bytes:
    """1 MB, of which 1 MB comes back."""
    return message(LARGE, np.arange(LARGE_ELEMENTS, dtype=np.float32)[None], name="x", **parameters)


def _each(model: str = MODEL, value: float = 1.0, rows: int = 1, **parameters: str) -> tuple[bytes, ...]:
    return tuple(message(model, pixels(k, value, rows), **parameters) for k in range(CLASSES))


def _bad() -> tuple[bytes, ...]:
    """Wrong in different ways."""
    short = oip_pb2.ModelInferRequest.FromString(message(MODEL, pixels(0)))
    short.raw_input_contents[0] = b"1234"
    return (
        b"\xff garbage",
        message(MODEL, pixels(0)[:, :-1]),
        message(MODEL, pixels(0), name="nobody"),
        message(MODEL, pixels(0), hedgerow_privacy="perhaps"),
        short.SerializeToString(),
    )


KINDS: Sequence[Kind] = (
    Kind("sure", 70, _each()),
    Kind("unsure", 12, _each(value=FAINT)),
    Kind("batch", 7, _each(rows=ROWS), rows=ROWS),
    Kind("bad input", 3, _bad(), allowed=frozenset({Status.INVALID_ARGUMENT})),
    Kind("unknown model", 2, _each("nobody"), allowed=frozenset({Status.NOT_FOUND})),
    Kind(
        "hurried",
        3,
        _each(),
        timeout_s=HURRY_S,
        allowed=frozenset({Status.OK, Status.DEADLINE_EXCEEDED, Status.RESOURCE_EXHAUSTED}),
    ),
    Kind("cancelled", 3, _each(value=FAINT), cancelled=True, allowed=frozenset({Status.OK, Status.CANCELLED})),
)
"""`weight` is in percent of the rate. The unsure are escalated; while the cloud is down, their answers are degraded."""


class Traffic:
    """Sends `KINDS` at `rate` a second over `channels` until cancelled."""

    def __init__(self, channels: Sequence[grpc.aio.Channel], rate: float, tally: Tally, seed: int = 1) -> None:
        self._calls: list[Call] = [channel.unary_unary(Grpc().path) for channel in channels]
        self._rate = rate
        self._tally = tally
        self._random = random.Random(seed)
        self._inflight = 0

    async def run(self) -> None:
        alarm = Alarm(asyncio.get_running_loop())
        weights = [kind.weight for kind in KINDS]
        due = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while True:
                due += self._random.expovariate(self._rate)
                if time.monotonic() < due:
                    await alarm.until(due)
                else:
                    await asyncio.sleep(0)
                self._tally.sent(time.monotonic() - due)
                if self._inflight >= MAX_INFLIGHT:
                    self._tally.unsent()
                    continue
                (kind,) = self._random.choices(KINDS, weights)
                group.create_task(self.ask(self._random.choice(self._calls), kind, due))

    async def ask(self, method: Call, kind: Kind, due: float) -> None:
        """One request, and what came of it."""
        k = self._random.randrange(len(kind.bodies))
        self._inflight += 1
        try:
            call = method(kind.bodies[k], timeout=kind.timeout_s)
            if kind.cancelled:
                await asyncio.sleep(self._random.uniform(0, CANCEL_WITHIN_S))
                call.cancel()
            status = await call.code()
            took_s = time.monotonic() - due
            if status not in kind.allowed:
                self._tally.failed(kind.name, f"{status.name}: {await call.details()}")
            elif status is not Status.OK:
                self._tally.met(kind.name, status.name)
            elif problem := self._judged(await call, k, kind.rows):
                self._tally.failed(kind.name, problem)
            else:
                self._tally.met(kind.name, status.name, took_s)
        finally:
            self._inflight -= 1

    def _judged(self, raw: bytes, k: int, rows: int) -> str:
        answer = oip_pb2.ModelInferResponse.FromString(raw)
        logits = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(-1, CLASSES)
        degraded = answer.parameters["hedgerow_degraded"].bool_param
        self._tally.answered_by("degraded" if degraded else answer.parameters["hedgerow_tier"].string_param)
        right = len(logits) == rows and bool((logits.argmax(axis=1) == k).all())
        return "" if right else f"{len(logits)} rows of classes {logits.argmax(axis=1)}; expected {rows} of {k}"
