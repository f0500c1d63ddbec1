"""The install machine of one model: what may follow what, and what a restart makes of it. Pure: no IO, no clock.

Invariants:

1. `active`, the release to come back to, changes only when a target passes its probation or when its own files are
   found broken; a failed target leaves it as it was.
2. The target's slot is never the active release's slot, so nothing that is needed is ever overwritten.
3. There is a target exactly when the phase is not `idle`; `previous` lives in the target's slot, so never beside it.
4. A release older than the newest ever confirmed (`floor`), or a manifest that was rejected, is never begun.
5. A process death makes nothing half-done count as done: it leads to `idle`, `fetching` or `staged`.
6. At most `MAX_CRASHES` process deaths are spent on a target while it is loaded, proved or on probation.

The shell (`hedgerow_edge.installer`) persists the result of `step` before it does what the new phase stands for.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import assert_never

import msgspec

MAX_CRASHES = 3
"""Process deaths with a target loaded after which it is given up."""
MAX_REJECTED = 64
"""Rejected manifests remembered for a model; the oldest are forgotten first, and those below the floor at once."""
MAX_REASON_CHARS = 400
SLOTS = ("a", "b")


class Phase(StrEnum):
    """Where the target is."""

    IDLE = "idle"
    """There is no target."""
    FETCHING = "fetching"
    """Its files are on their way into its slot."""
    STAGED = "staged"
    """Its files are complete and verified in its slot."""
    PROVING = "proving"
    """It is loaded beside what serves, and must reproduce its probe vectors."""
    ACTIVATING = "activating"
    """It takes over."""
    PROBATION = "probation"
    """It serves, and must do so without repeated faults for a while."""


class Release(msgspec.Struct, frozen=True, kw_only=True):
    """A release in a slot. `variant` is the name of the one chosen for this device, known once it is fetched."""

    counter: int
    manifest: str
    """SHA-256 of manifest.json, hex."""
    slot: str
    variant: str = ""


class Rejection(msgspec.Struct, frozen=True, kw_only=True):
    """A release that must not be tried again, and why."""

    counter: int
    manifest: str
    reason: str


class Install(msgspec.Struct, frozen=True, kw_only=True):
    """All that is persisted about one model's installs. `rejected` has the newest last."""

    phase: Phase = Phase.IDLE
    active: Release | None = None
    """The confirmed release: what a restart serves."""
    previous: Release | None = None
    """The one confirmed before, still whole in the other slot: what serves if `active` is found broken."""
    target: Release | None = None
    floor: int = 0
    """The highest counter ever confirmed; never goes down."""
    crashes: int = 0
    """Process deaths spent on the target."""
    reason: str = ""
    """Why the last failure was one; empty after a success, and once another release is assigned."""
    rejected: tuple[Rejection, ...] = ()

    @property
    def serving(self) -> Release | None:
        """The release that answers in this phase."""
        return self.target if self.phase is Phase.PROBATION else self.active

    @property
    def free_slot(self) -> str:
        """The slot that a new target may overwrite."""
        return next(slot for slot in SLOTS if self.active is None or slot != self.active.slot)

    def wants(self, counter: int, manifest: str) -> bool:
        """Whether an assigned release is news: newer than what is active, not below the floor, not rejected."""
        newer = self.active is None or counter > self.active.counter
        return newer and counter >= self.floor and not any(entry.manifest == manifest for entry in self.rejected)


class Begin(msgspec.Struct, frozen=True, kw_only=True):
    """A release that `Install.wants` is assigned."""

    counter: int
    manifest: str


class Interrupted(msgspec.Struct, frozen=True):
    """The transfer stopped for a fault of the way (link, disk, a chunk damaged in transit): to be resumed."""

    reason: str


class Fetched(msgspec.Struct, frozen=True):
    """Every file that `variant` needs is in the slot, synced and verified."""

    variant: str


class Damaged(msgspec.Struct, frozen=True):
    """The target's files in the slot are no longer what was verified: to be fetched anew."""

    reason: str


class Prove(msgspec.Struct, frozen=True):
    """The target is about to be loaded and probed."""


class Proved(msgspec.Struct, frozen=True):
    """The probe vectors were reproduced within the limits."""


class Activated(msgspec.Struct, frozen=True):
    """The target answers now."""


class Passed(msgspec.Struct, frozen=True):
    """The probation is over, and the target has stood it."""


class Rejected(msgspec.Struct, frozen=True):
    """The target itself is at fault: final for its manifest."""

    reason: str


class Superseded(msgspec.Struct, frozen=True):
    """Another release is assigned: this one is dropped without blame."""


class Stopped(msgspec.Struct, frozen=True):
    """The process ends in good order."""


class Died(msgspec.Struct, frozen=True):
    """A new process finds the machine as an older one left it."""


class Broken(msgspec.Struct, frozen=True):
    """The active release's files are not there or do not match their digests."""

    reason: str


Event = (
    Begin
    | Interrupted
    | Fetched
    | Damaged
    | Prove
    | Proved
    | Activated
    | Passed
    | Rejected
    | Superseded
    | Stopped
    | Died
    | Broken
)

TABLE: Mapping[Phase, Mapping[type[Event], Phase]] = {
    Phase.IDLE: {
        Begin: Phase.FETCHING,
        Stopped: Phase.IDLE,
        Died: Phase.IDLE,
        Broken: Phase.IDLE,
    },
    Phase.FETCHING: {
        Fetched: Phase.STAGED,
        Interrupted: Phase.FETCHING,
        Rejected: Phase.IDLE,
        Superseded: Phase.IDLE,
        Stopped: Phase.FETCHING,
        Died: Phase.FETCHING,
        Broken: Phase.FETCHING,
    },
    Phase.STAGED: {
        Prove: Phase.PROVING,
        Damaged: Phase.FETCHING,
        Rejected: Phase.IDLE,
        Superseded: Phase.IDLE,
        Stopped: Phase.STAGED,
        Died: Phase.STAGED,
        Broken: Phase.STAGED,
    },
    Phase.PROVING: {
        Proved: Phase.ACTIVATING,
        Rejected: Phase.IDLE,
        Stopped: Phase.STAGED,
        Died: Phase.STAGED,  # or idle, when it died too often
    },
    Phase.ACTIVATING: {
        Activated: Phase.PROBATION,
        Rejected: Phase.IDLE,
        Stopped: Phase.STAGED,
        Died: Phase.STAGED,
    },
    Phase.PROBATION: {
        Passed: Phase.IDLE,
        Rejected: Phase.IDLE,
        Stopped: Phase.STAGED,
        Died: Phase.STAGED,
    },
}

LOADED = frozenset({Phase.PROVING, Phase.ACTIVATING, Phase.PROBATION})
"""Phases in which the target is in the process's memory and may be what kills it."""


def step(now: Install, event: Event) -> Install:
    """What `event` makes of `now`; ValueError for an event that cannot happen in that phase."""
    if isinstance(event, Died) and now.phase in LOADED and now.crashes + 1 >= MAX_CRASHES:
        event = Rejected(f"the process died {MAX_CRASHES} times with it loaded, last in {now.phase}")
    phase = TABLE[now.phase].get(type(event))
    if phase is None:
        raise ValueError(f"{type(event).__name__} cannot happen in phase {now.phase}")
    changes: dict[str, object] = {}
    match event:
        case Begin():
            if not now.wants(event.counter, event.manifest):
                raise ValueError(f"release {event.counter} is rejected, or not newer than the active one")
            target = Release(counter=event.counter, manifest=event.manifest, slot=now.free_slot)
            changes = {"target": target, "previous": None, "crashes": 0, "reason": ""}
        case Fetched():
            changes = {"target": _target(now, variant=event.variant), "reason": ""}
        case Interrupted() | Damaged():
            changes = {"reason": _short(event.reason)}
        case Passed():
            target = _target(now)
            changes = {"active": target, "previous": now.active, "target": None, "crashes": 0, "reason": ""}
            changes["floor"] = floor = max(now.floor, target.counter)
            changes["rejected"] = tuple(entry for entry in now.rejected if entry.counter >= floor)
        case Rejected():
            target, reason = _target(now), _short(event.reason)
            entry = Rejection(counter=target.counter, manifest=target.manifest, reason=reason)
            changes = {"target": None, "crashes": 0, "reason": reason}
            changes["rejected"] = (*now.rejected, entry)[-MAX_REJECTED:]
        case Superseded():
            changes = {"target": None, "crashes": 0, "reason": ""}
        case Died():
            changes = {"crashes": now.crashes + (now.phase in LOADED)}
        case Broken():
            if now.active is None:
                raise ValueError("there is no active release to be broken")
            changes = {"active": now.previous, "previous": None, "reason": _short(event.reason)}
        case Prove() | Proved() | Activated() | Stopped():
            pass
        case _:
            assert_never(event)
    return msgspec.structs.replace(now, phase=phase, **changes)


def _target(now: Install, variant: str = "") -> Release:
    if now.target is None:
        raise ValueError(f"phase {now.phase} without a target")
    return msgspec.structs.replace(now.target, variant=variant or now.target.variant)


def _short(reason: str) -> str:
    return reason if len(reason) <= MAX_REASON_CHARS else reason[: MAX_REASON_CHARS - 1] + "…"
