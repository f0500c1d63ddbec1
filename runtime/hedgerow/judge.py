"""Who may judge the edge's answers: the gates of each model and version, held against the guarantees behind them.

The rules are `hedgerow.gate`'s; this fetches the facts that they need (the metadata of student and teacher) and keeps
what was found.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Final

import msgspec

from hedgerow.backend import Backend, Deadline
from hedgerow.errors import HedgerowError, InvalidRelease, ModelNotFound, ModelNotReady
from hedgerow.gate import Gate, Guarantee, covers, mismatch
from hedgerow.tensors import InferResponse, ModelMetadata

TEACHER_TIMEOUT_S = 0.25
"""How long a request may wait for the teacher's metadata, which a remote has at hand after the first time."""
TEACHER_SHARE = 0.25
"""The most of what is left of its deadline that the request waits for it: the edge must still have time to answer."""
TEACHER_AGE_S = 1.0
"""How long what the teacher says of itself is taken for what it is; a remote's word is older than that anyway."""
TEACHER_RETRY_S = 5.0
"""Pause after a failed lookup, in which what was known last counts."""
UNSCORED = frozenset({"BYTES", "BF16"})
"""Datatypes whose arrays hold no numbers: text, and bits that numpy takes for integers."""
NO_RELEASE = "no release on the device"

_UNKNOWN: Final[Mapping[str, str]] = {}

log = logging.getLogger(__name__)


class Verdict(msgspec.Struct, frozen=True):
    """The gate for one answer, or in words why there is none."""

    gate: Gate | None
    reason: str = ""
    version: str = ""
    """Whose answers it judges."""
    refused: bool = False
    """Whether there is, or may be, a gate that cannot be used. False without one: then none was ever promised."""
    student: ModelMetadata | None = None
    """Who was looked at."""

    def is_of_another(self, answer: InferResponse) -> bool:
        """Whether `answer` came from another version than it is about, or from another file under the same one."""
        if answer.version != self.version:
            return True
        return answer.source is not None and answer.source is not self.student


class _Entry(msgspec.Struct):
    gate: Gate | None
    guarantee: Guarantee | None
    said: set[str] = set()
    seen: tuple[ModelMetadata, Mapping[str, str], Verdict] | None = None
    """Student and teacher as they were when they were looked at last, and what that gave."""


class _Teacher(msgspec.Struct):
    properties: Mapping[str, str] = {}
    look_at: float = 0.0
    """When to look again."""


class Judges:
    """The gates by model and version."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._teachers: dict[tuple[str, str], _Teacher] = {}

    def set(self, model: str, version: str, gate: Gate | None, guarantee: Guarantee | None) -> None:
        """Let `gate`, or without one `guarantee`'s, judge a version; raises `InvalidRelease` if they do not fit."""
        if guarantee is not None:
            gate = gate or guarantee.gate
            if not covers(guarantee, gate):
                raise InvalidRelease(f"the gate of {model}/{version} is not one that its guarantee covers")
        self._entries[model, version] = _Entry(gate, guarantee)

    def drop(self, model: str, version: str) -> None:
        """Forget the gate of a version."""
        self._entries.pop((model, version), None)

    async def find(
        self,
        model: str,
        version: str,
        edge: Backend,
        cloud: Backend | None,
        cloud_model: str,
        deadline: Deadline,
        student: ModelMetadata | None = None,
    ) -> Verdict:
        """The gate for an answer that `edge` gave or is about to give; an empty version is the one serving now.

        The student, where it is not given, is looked at each time: its file may be replaced under the same version.
        """
        try:
            student = student or await edge.metadata(model, version)
            version = version or (student.versions[-1] if student.versions else "")
            entry = self._entries.get((model, version))
            if entry is None or entry.gate is None:
                await edge.metadata(model, version)  # raises if it is gone, and perhaps its gate with it
                return Verdict(None, f"no gate for {model}/{version}", version, student=student)
        except (ModelNotFound, ModelNotReady):
            if version:  # it has answered, and was let go before it could be looked at
                return Verdict(None, f"gate refused: {model}/{version} is gone", version, refused=True)
            return Verdict(None, NO_RELEASE)
        except HedgerowError as error:
            return Verdict(None, f"gate refused: {error}", version, refused=True)
        teacher = _UNKNOWN
        if entry.guarantee is not None and cloud is not None:
            teacher = await self._teacher(entry, cloud, cloud_model, deadline)
        seen = entry.seen
        if seen is None or seen[0] is not student or seen[1] is not teacher:
            seen = entry.seen = student, teacher, _verdict(entry, entry.gate, student, teacher, version)
        return seen[2]

    async def _teacher(self, entry: _Entry, cloud: Backend, cloud_model: str, deadline: Deadline) -> Mapping[str, str]:
        """What the cloud says of its model, as of late; nothing while it has never been heard."""
        teacher = self._teachers.setdefault((cloud.name, cloud_model), _Teacher())
        now = time.monotonic()
        if now >= teacher.look_at and cloud.snapshot(cloud_model).healthy:
            wait_s = min(TEACHER_TIMEOUT_S, TEACHER_SHARE * deadline.remaining)
            try:
                async with asyncio.timeout(wait_s):
                    properties = (await cloud.metadata(cloud_model)).properties
            except (HedgerowError, TimeoutError):
                if wait_s == TEACHER_TIMEOUT_S:  # who is in a hurry must not have the others go without
                    teacher.look_at = time.monotonic() + TEACHER_RETRY_S
            else:
                teacher.look_at = now + TEACHER_AGE_S
                if properties != teacher.properties:
                    teacher.properties = properties
                if not properties.get("sha256"):
                    _say_once(
                        entry, logging.WARNING, f"{cloud.name} does not say its model's digest: it is not checked"
                    )
        return teacher.properties


def _verdict(entry: _Entry, gate: Gate, student: ModelMetadata, teacher: Mapping[str, str], version: str) -> Verdict:
    """Whether `gate` may judge what `student` answers in `version`."""
    datatype = next((spec.datatype for spec in student.outputs if spec.name == gate.output), None)
    reason = ""
    if datatype is None:
        reason = f"it judges the output {gate.output!r}, which {student.name}/{version} does not have"
    elif datatype in UNSCORED:
        reason = f"it judges the output {gate.output!r}, which is {datatype} and has no scores"
    elif entry.guarantee is not None:
        reason = mismatch(entry.guarantee, student.properties, teacher)
    if not reason:
        return Verdict(gate, version=version, student=student)
    reason = f"gate refused: {reason}"
    _say_once(entry, logging.ERROR, f"{student.name}/{version}: {reason}")
    return Verdict(None, reason, version, refused=True, student=student)


def _say_once(entry: _Entry, level: int, text: str) -> None:
    if text not in entry.said:
        entry.said.add(text)
        log.log(level, "%s", text)
