"""The shell around the install machine: brings one release after another to life on this device.

Each step is journalled before it is done (`hedgerow_edge.install` says what may follow what)::

    fetching     files into the free slot, verified          transfer, slots
    staged       waiting there, verified again               slots
    proving      loaded beside what serves, probes           host, proof
    activating   swapped in, its gate with it                host, router
    probation    live traffic without repeated faults        host

and then confirmed: the new active release; or rejected: the active one serves on, or again, and the reason is kept.

What goes wrong with the release itself is final for its manifest. What goes wrong on the way to it (the link, the disk,
chunks damaged in transit) is tried again later. Either way the device keeps what it has. The active release is given up
only if its files are damaged; one that cannot be loaded for now is tried again at each check and each start.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from hedgerow.config import Count, Seconds, Settings
from hedgerow.errors import EngineFault, HedgerowError, InvalidRelease, LinkError, Overloaded, TransferFailed
from hedgerow.host.model_host import ModelHost, Staged
from hedgerow.host.settings import ModelFile
from hedgerow.proto.link_pb2 import ModelStatus
from hedgerow.release import MANIFEST
from hedgerow.router import Router
from hedgerow_edge.install import (
    LOADED,
    Activated,
    Begin,
    Broken,
    Damaged,
    Died,
    Event,
    Fetched,
    Install,
    Interrupted,
    Passed,
    Phase,
    Prove,
    Proved,
    Rejected,
    Rejection,
    Release,
    Stopped,
    Superseded,
    step,
)
from hedgerow_edge.proof import prove, resident_bytes
from hedgerow_edge.slots import Held, needed
from hedgerow_edge.store import Store
from hedgerow_edge.transfer import Transfer
from hedgerow_edge.trust import Assigned

PROBATION_LOOK_S = 0.1
"""How often the faults of a release on probation are looked at."""

_log = logging.getLogger(__name__)


class UpdateSettings(Settings, frozen=True, kw_only=True):
    """How releases come in."""

    probation_s: Seconds = 30.0
    """A release is confirmed after this time,"""
    probation_requests: Count = 200
    """or after this many answers, whichever comes first;"""
    probation_faults: Count = 3
    """and rejected at this many faults (crashes, answers that are not finite): a single one may be an odd input's."""
    poll_s: Seconds = 900.0
    """How often to ask for news without having been told of any."""
    retry_s: Seconds = 15.0
    """First wait after an interrupted transfer; doubled each time, up to `poll_s`."""


@dataclass(slots=True)
class _Transferred:
    """How far the target's files are."""

    done: int = 0
    total: int = 0


class Installer:
    """The releases of one device: the journal's machines, and the host and router that follow them.

    `engines` are those installed here in the order of preference. `admit` is called with each model that gets here, so
    that it has a route, and `on_change` whenever `status` may have something new to say.
    """

    def __init__(
        self,
        store: Store,
        host: ModelHost,
        router: Router,
        settings: UpdateSettings,
        *,
        profile: str,
        engines: Sequence[str],
        admit: Callable[[str], None],
        on_change: Callable[[], None],
    ) -> None:
        self._store = store
        self._host = host
        self._router = router
        self._settings = settings
        self._profile = profile
        self._engines = engines
        self._admit = admit
        self._on_change = on_change
        self._installs: dict[str, Install] = {}
        self._running: dict[str, Release] = {}
        self._transferred: dict[str, _Transferred] = {}
        self._assigned_again: dict[str, Rejection | None] = {}
        """By model: why what is assigned is not taken, if it was rejected before."""
        self._unloaded: dict[str, str] = {}
        """By model: why the active release, which is whole, cannot be loaded for now."""

    @property
    def fetching(self) -> bool:
        """Whether there is a release whose files are on their way."""
        return any(install.phase is Phase.FETCHING for install in self._installs.values())

    def status(self) -> list[ModelStatus]:
        """What runs, what is under way and what went wrong, by model."""
        return [self._status_of(model, install) for model, install in sorted(self._installs.items())]

    async def recover(self, reserved: Collection[str] = ()) -> None:
        """Take up the journal where the last process left it and serve every active release that is whole.

        The journal of `reserved` models, which the settings bring now, is left as it is.
        """
        installs = await asyncio.to_thread(self._store.installs)
        self._installs = {model: install for model, install in installs.items() if model not in reserved}
        for model, install in tuple(self._installs.items()):
            if install.phase in LOADED:
                _log.warning("%s: the last process ended in %s", _name(model, install.target), install.phase)
            self._admit(model)
            await self._note(model, Died())
            await self._serve_active(model)

    async def finish_begun(self) -> None:
        """Bring to life what is staged, and serve what could not be loaded before.

        Needs no link, and must not: without it there may be no model at all.
        """
        for model in tuple(self._installs):
            if model in self._unloaded:
                await self._serve_active(model)
            await self._bring_to_life(model)

    async def take(self, assigned: Assigned, transfer: Transfer) -> bool:
        """Work on an assignment until it is confirmed, rejected or interrupted; False for the last."""
        model = assigned.model
        install = self._installs.get(model, Install())
        if install.target is not None and install.target.manifest != assigned.manifest_sha256:
            await self._step(model, Superseded())
            install = self._installs[model]
        if install.target is None:
            rejections = (entry for entry in install.rejected if entry.manifest == assigned.manifest_sha256)
            self._assigned_again[model] = next(rejections, None)
            if not install.wants(assigned.counter, assigned.manifest_sha256):
                self._on_change()
                return True
            _log.info("%s is assigned to this device", assigned.name)
            self._admit(model)
            await self._step(model, Begin(counter=assigned.counter, manifest=assigned.manifest_sha256))
        while self._installs[model].phase is Phase.FETCHING:
            if not await self._fetch(assigned, transfer):
                return False
            await self._bring_to_life(model)
        return self._installs[model].phase is not Phase.STAGED

    async def stop(self) -> None:
        """Put away what is under way, once nothing works on it any more, so that a stop is not taken for a crash."""
        for model, install in tuple(self._installs.items()):
            if install.phase in LOADED:
                await self._note(model, Stopped())

    # Steps

    async def _fetch(self, assigned: Assigned, transfer: Transfer) -> bool:
        """Bring the files into the slot. False if it has to be tried again later."""
        model, target = assigned.model, self._installs[assigned.model].target
        assert target is not None
        progress = self._transferred[model] = _Transferred()
        try:
            folder = await asyncio.to_thread(self._store.slots.prepare, model, target)
            manifest = await transfer.manifest(assigned, folder / MANIFEST)
            variant = manifest.choose(self._profile, self._engines)
            files, before = needed(manifest, variant), 0
            progress.total = sum(file.bytes for file in files)
            for file in files:
                into = folder / file.path
                into.parent.mkdir(parents=True, exist_ok=True)

                def on_progress(done: int, _size: int, base: int = before) -> None:
                    progress.done = base + done
                    self._on_change()

                await transfer.fetch(file, into, on_progress)
                before += file.bytes
                on_progress(0, 0, before)
            fetched = Release(counter=target.counter, manifest=target.manifest, slot=target.slot, variant=variant.name)
            await asyncio.to_thread(self._store.slots.read, model, fetched)
        except (LinkError, TransferFailed, OSError) as error:
            await self._step(model, Interrupted(str(error)))
            return False
        except InvalidRelease as error:
            await self._step(model, Rejected(str(error)))
            return True
        _log.info("%s is here: variant %s, %d bytes", manifest.name, variant.name, progress.total)
        await self._step(model, Fetched(variant.name))
        return True

    async def _bring_to_life(self, model: str) -> None:
        """Take a staged target through proof and probation to the end. Does nothing in any other phase."""
        target = self._installs[model].target
        if target is None or self._installs[model].phase is not Phase.STAGED:
            return
        try:
            held = await asyncio.to_thread(self._store.slots.read, model, target)
        except InvalidRelease as error:
            await self._step(model, Damaged(str(error)))
            return
        try:
            staged = await self._prove(model, held)
            await self._activate(model, target, staged)
            await self._watch(model, target, staged)
        except (Overloaded, sqlite3.Error) as error:  # no fault of the release: back to where a restart would begin
            _log.warning("%s has to wait: %s", _name(model, target), error)
            if self._installs[model].phase in LOADED:
                await self._note(model, Stopped())
                await self._return(model, target)
        except HedgerowError as error:
            await self._note(model, Rejected(str(error)))
            await self._return(model, target)
        except Exception as error:  # noqa: BLE001  whatever it is, the release is what is new
            _log.exception("%s could not be brought to life", _name(model, target))
            await self._note(model, Rejected(f"unexpected {type(error).__name__}; see the device's log"))
            await self._return(model, target)

    async def _prove(self, model: str, held: Held) -> Staged:
        await self._step(model, Prove())
        memory_before = resident_bytes()
        staged = await self._stage(model, held)
        try:
            await prove(staged, held, memory_before)
            await self._step(model, Proved())
        except BaseException:
            await self._host.discard(staged)
            raise
        return staged

    async def _activate(self, model: str, target: Release, staged: Staged) -> None:
        old = self._running.get(model)
        self._running[model] = target
        self._unloaded.pop(model, None)
        await self._host.activate(staged)
        if old is not None:
            self._router.drop_gate(model, str(old.counter))
        _log.info("%s serves, on probation", _name(model, target))
        await self._step(model, Activated())

    async def _watch(self, model: str, target: Release, staged: Staged) -> None:
        """Confirm the target after its probation; raises `EngineFault` if it does not stand it."""
        until = time.monotonic() + self._settings.probation_s
        probes, enough, too_many = staged.answers, self._settings.probation_requests, self._settings.probation_faults
        while staged.faults < too_many and staged.answers - probes < enough and time.monotonic() < until:  # noqa: ASYNC110 (nobody tells)
            await asyncio.sleep(PROBATION_LOOK_S)
        if staged.faults >= too_many:
            raise EngineFault(f"{_name(model, target)} failed on live traffic: {staged.faults} faults on probation")
        await self._step(model, Passed())
        await self._mark(model, target)
        _log.info("%s is confirmed after %d answers", _name(model, target), staged.answers - probes)

    async def _return(self, model: str, target: Release) -> None:
        """Have the active release serve again if the failed target serves in its place."""
        if self._running.get(model) == target:
            await self._serve_active(model)
        self._router.drop_gate(model, str(target.counter))

    async def _serve_active(self, model: str) -> None:
        """Serve the active release, else the one before it, else none: then the cloud answers."""
        staged, active = await self._stage_active(model), self._installs[model].active
        if staged is not None and active is not None:
            self._running[model] = active
            await self._host.activate(staged)
            await self._mark(model, active)
            _log.info("%s serves", _name(model, active))
        else:
            self._running.pop(model, None)
            if self._host.serving(model) is not None:
                await self._host.unload(model)
            if model not in self._unloaded:
                _log.info("no release of %s serves here", model)
        self._on_change()

    async def _stage_active(self, model: str) -> Staged | None:
        """Load the active release, or the one before it if its files are damaged; None if neither can be had now."""
        before = self._unloaded.pop(model, "")
        while (active := self._installs[model].active) is not None:
            try:
                held = await asyncio.to_thread(self._store.slots.read, model, active)
                return await self._stage(model, held)
            except InvalidRelease as error:
                await self._note(model, Broken(str(error)))
            except (HedgerowError, MemoryError) as error:
                why = f"{_name(model, active)} cannot be loaded now: {str(error) or 'out of memory'}"
                if why != before:
                    _log.warning("%s", why)
                self._unloaded[model] = why
                return None
        return None

    async def _stage(self, model: str, held: Held) -> Staged:
        """Load a release beside what serves, its gate in place: an answer is judged by the gate of its version."""
        variant, version = held.variant, str(held.manifest.counter)
        self._router.set_gate(model, version, variant.guarantee.gate if variant.guarantee else None, variant.guarantee)
        file = ModelFile(
            model,
            version,
            held.folder / variant.file,
            engine=variant.engine,
            sha256=held.manifest.file(variant.file).sha256,
            precision=variant.precision,
            labels=held.manifest.labels,
        )
        return await self._host.stage(file)

    # The journal

    async def _step(self, model: str, event: Event) -> None:
        """Journal what `event` makes of the model's machine; only then is it so."""
        await self._save(model, step(self._installs.get(model, Install()), event))

    async def _note(self, model: str, event: Event) -> None:
        """As `_step`, for what is so whether the disk takes it or not; a restart would find out again."""
        after = step(self._installs[model], event)
        try:
            if after != self._installs[model]:
                await self._save(model, after)
        except sqlite3.Error as error:
            _log.error("%s: the journal cannot be written: %s", model, error)
            self._become(model, after)

    async def _save(self, model: str, after: Install) -> None:
        """Carried through once begun, so that a cancellation cannot part us from the journal."""
        saving = asyncio.get_running_loop().run_in_executor(None, self._store.save, model, after)
        try:
            await asyncio.shield(saving)
        except asyncio.CancelledError:
            await asyncio.wait([saving])
            if saving.exception() is None:
                self._become(model, after)
            raise
        self._become(model, after)

    def _become(self, model: str, after: Install) -> None:
        before = self._installs.get(model, Install())
        self._installs[model] = after
        if after.reason and after.reason != before.reason:
            _log.warning("%s, %s: %s", _name(model, before.target or before.active), before.phase, after.reason)
        self._on_change()

    async def _mark(self, model: str, release: Release) -> None:
        """Put the marker on a confirmed release, unless it is there; the journal knows it anyway."""
        try:
            await asyncio.to_thread(self._store.slots.confirm, model, release)
        except OSError as error:
            _log.warning("%s cannot be marked as confirmed: %s", _name(model, release), error)

    def _status_of(self, model: str, install: Install) -> ModelStatus:
        running, target = self._running.get(model), install.target
        again = self._assigned_again.get(model)
        rejected = again or (install.rejected[-1] if install.rejected else None)
        moved = self._transferred.get(model, _Transferred())
        return ModelStatus(
            model=model,
            running=running.counter if running else 0,
            running_manifest=running.manifest if running else "",
            target=target.counter if target else 0,
            phase=install.phase,
            reason=self._unloaded.get(model) or (again.reason if again else install.reason),
            bytes_done=moved.done if target else 0,
            bytes_total=moved.total if target else 0,
            failed=rejected.counter if rejected else 0,
        )


def _name(model: str, release: Release | None) -> str:
    return f"{model}/{release.counter}" if release else model
