"""What the fleet knows, in one SQLite file: devices and what they run, releases, assignments, samples.

Rules:

- a device's facts are ordered by (session, serial); what is older than the newest known is stale and changes nothing;
- a will (a status that says offline) ends its session: nothing more of that session counts, a later session does;
- a release is never changed once it is in;
- a sample is kept once for each model and digest; the oldest make room when the bound is reached.

Methods block on the disk: call them through `asyncio.to_thread`. One lock lets one in at a time. What is committed is
on the disk (synchronous=FULL), so a receipt may be sent for it.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, delete, event, func, select
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import Session, selectinload

from hedgerow.errors import ConfigError, InvalidRelease, NotFound, Overloaded, Unavailable
from hedgerow.proto import fleet_pb2, link_pb2
from hedgerow.release import Manifest
from hedgerow_cloud.fleet.tables import (
    SCHEMA,
    AssignmentRow,
    Base,
    BlobRow,
    DeviceRow,
    ModelRow,
    ReleaseRow,
    SampleRow,
)

BUSY_TIMEOUT_MS = 5_000
MAX_TEXT = 512
"""Characters kept of a text that a device reports."""
MAX_MODELS = 64
"""Models a device may report."""
MAX_INTEGER = 2**63 - 1
"""SQLite's integers are signed; the wire's are not."""


class Store:
    """The fleet's state in `file`, made if it is not there; `sample_bytes` bounds what all samples take together."""

    def __init__(self, file: Path, *, sample_bytes: int = 2**30, max_devices: int = 10_000) -> None:
        self._sample_bytes = sample_bytes
        self._max_devices = max_devices
        self._lock = threading.Lock()
        self._engine = create_engine(f"sqlite:///{file}")
        event.listen(self._engine, "connect", _configure)
        event.listen(self._engine, "begin", _begin)
        try:
            self._prepare(file)
        except DatabaseError as error:
            self.close()
            raise ConfigError(f"cannot open the fleet's database {file}: {error.orig}") from error
        except ConfigError:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file; idempotent."""
        self._engine.dispose()

    # Devices

    def birth(self, device: str, birth: link_pb2.Birth) -> bool:
        """Take in a birth; False if it is stale or nothing new. Raises `Overloaded` when there are too many devices."""
        with self._transaction() as session:
            row = self._device(session, device)
            number = _integer(birth.session)
            facts = {
                "profile": birth.profile[:MAX_TEXT],
                "version": birth.hedgerow_version[:MAX_TEXT],
                "platform": birth.platform[:MAX_TEXT],
                "address": birth.address[:MAX_TEXT],
            }
            if number < row.session or (
                number == row.session and all(getattr(row, name) == value for name, value in facts.items())
            ):
                return False
            for name, value in facts.items():
                setattr(row, name, value)
            _start(row, number)
            row.online = not row.ended
            row.last_seen_unix_ms = _now_ms()
            return True

    def status(self, device: str, status: link_pb2.Status) -> bool:
        """Take in a status or a will; False if it is stale. A status that overtakes its birth starts the session."""
        with self._transaction() as session:
            row = self._device(session, device)
            number, serial = _integer(status.session), _integer(status.serial)
            if number < row.session:
                return False
            # A will is written before the session's statuses, so its serial says nothing.
            if number == row.session and (row.ended or (status.online and serial <= row.serial)):
                return False
            _start(row, number)
            row.online = status.online
            row.ended = not status.online
            row.last_seen_unix_ms = _now_ms()
            if not status.online and not status.models:
                return True
            row.serial = serial
            row.trust = status.trust[:MAX_TEXT]
            row.bytes_fetched = _integer(status.bytes_fetched)
            row.bytes_refetched = _integer(status.bytes_refetched)
            known = {model.model: model for model in row.models}
            reported = {fact.model: fact for fact in status.models[:MAX_MODELS] if len(fact.model) <= MAX_TEXT}
            row.models = [_fill(known.get(name) or ModelRow(model=name), fact) for name, fact in reported.items()]
            return True

    def devices(self) -> list[fleet_pb2.Device]:
        """Every device, by id."""
        with self._transaction() as session:
            whole = select(DeviceRow).options(selectinload(DeviceRow.models), selectinload(DeviceRow.assigned))
            return [_device_message(row) for row in session.scalars(whole.order_by(DeviceRow.id))]

    def device(self, device: str) -> fleet_pb2.Device:
        """One device; raises `NotFound`."""
        with self._transaction() as session:
            return _device_message(_known(session, device))

    # Releases

    def add_release(self, manifest: Manifest, manifest_sha256: str, manifest_bytes: int) -> fleet_pb2.Release:
        """Write down a published release; the same one again changes nothing, another one in its place is refused."""
        with self._transaction() as session:
            row = session.get(ReleaseRow, (manifest.model, manifest.counter))
            if row is None:
                guarantees = [variant.guarantee for variant in manifest.variants if variant.guarantee is not None]
                blobs = {file.sha256: file.bytes for file in manifest.files} | {manifest_sha256: manifest_bytes}
                row = ReleaseRow(
                    model=manifest.model,
                    counter=manifest.counter,
                    manifest_sha256=manifest_sha256,
                    manifest_bytes=manifest_bytes,
                    bytes=manifest.bytes,
                    published_unix_ms=_now_ms(),
                    guarantee=str(guarantees[0]) if guarantees else "",
                    blobs=[BlobRow(sha256=sha256, bytes=size) for sha256, size in blobs.items()],
                )
                session.add(row)
                session.flush()
            elif row.manifest_sha256 != manifest_sha256:
                raise InvalidRelease(f"release {manifest.name} is already published with other content")
            return _release_message(session, row)

    def releases(self, model: str = "") -> list[fleet_pb2.Release]:
        """The releases of `model`, or of all models, in order."""
        query = select(ReleaseRow).order_by(ReleaseRow.model, ReleaseRow.counter)
        if model:
            query = query.where(ReleaseRow.model == model)
        with self._transaction() as session:
            return [_release_message(session, row) for row in session.scalars(query)]

    def blob_bytes(self, sha256: str) -> int | None:
        """Size of the published file with this digest; None if there is none."""
        with self._transaction() as session:
            return session.scalars(select(BlobRow.bytes).where(BlobRow.sha256 == sha256).limit(1)).one_or_none()

    def blobs(self) -> set[str]:
        """Digests of all published files."""
        with self._transaction() as session:
            return set(session.scalars(select(BlobRow.sha256).distinct()))

    # Assignments

    def assign(self, devices: Sequence[str], model: str, counter: int) -> None:
        """Give a release to `devices`, all or none, and count a command to each; raises `NotFound`."""
        with self._transaction() as session:
            if session.get(ReleaseRow, (model, counter)) is None:
                raise NotFound(f"there is no release {model}/{counter}; `hedgerow releases` lists them")
            for device in devices:
                _known(session, device).commands += 1
                session.merge(AssignmentRow(device=device, model=model, counter=counter))

    def assignments(self, device: str) -> list[tuple[str, int, str, int]]:
        """(model, counter, sha256 of the manifest, its bytes) of each release that `device` is to run."""
        with self._transaction() as session:
            return [
                (row.model, row.counter, row.release.manifest_sha256, row.release.manifest_bytes)
                for row in _known(session, device).assigned
            ]

    def commands(self) -> dict[str, int]:
        """Serial of the last command to each device that was ever sent one."""
        with self._transaction() as session:
            rows = session.execute(select(DeviceRow.id, DeviceRow.commands).where(DeviceRow.commands > 0))
            return {row.id: row.commands for row in rows}

    # Samples

    def add_samples(self, device: str, model: str, samples: Sequence[link_pb2.Sample]) -> list[str]:
        """Keep `samples`, each digest once; gives the digests that are on the disk now."""
        with self._transaction() as session:
            for sample in samples:
                seen = select(SampleRow.id).where(SampleRow.model == model, SampleRow.digest == sample.digest)
                if session.scalars(seen).one_or_none() is None:
                    content = sample.SerializeToString()
                    session.add(
                        SampleRow(model=model, digest=sample.digest, device=device, size=len(content), content=content)
                    )
                    session.flush()
            self._make_room(session)
        return [sample.digest for sample in samples]

    def samples(self, model: str, after: int = 0, limit: int = 64) -> list[tuple[int, link_pb2.Sample]]:
        """At most `limit` samples of `model` that arrived after number `after`, each with its number."""
        query = (
            select(SampleRow.id, SampleRow.content)
            .where(SampleRow.model == model, SampleRow.id > after)
            .order_by(SampleRow.id)
            .limit(limit)
        )
        with self._transaction() as session:
            return [(number, link_pb2.Sample.FromString(content)) for number, content in session.execute(query)]

    def _prepare(self, file: Path) -> None:
        with self._engine.begin() as connection:
            found = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if found not in {0, SCHEMA}:
                raise ConfigError(f"{file} has schema {found}; this version of Hedgerow reads schema {SCHEMA}")
            Base.metadata.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA}")

    def _make_room(self, session: Session) -> None:
        excess = (session.scalar(select(func.sum(SampleRow.size))) or 0) - self._sample_bytes
        if excess <= 0:
            return
        last = 0
        for number, size in session.execute(select(SampleRow.id, SampleRow.size).order_by(SampleRow.id)):
            last, excess = number, excess - size
            if excess <= 0:
                break
        session.execute(delete(SampleRow).where(SampleRow.id <= last))

    def _device(self, session: Session, device: str) -> DeviceRow:
        row = session.get(DeviceRow, device)
        if row is None:
            if (session.scalar(select(func.count()).select_from(DeviceRow)) or 0) >= self._max_devices:
                raise Overloaded(f"the fleet is full: it takes {self._max_devices} devices")
            row = DeviceRow(id=device)
            session.add(row)
            session.flush()
        return row

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        try:
            with self._lock, Session(self._engine) as session, session.begin():
                yield session
        except OperationalError as error:  # a full or failing disk, a lock held for too long by another process
            raise Unavailable(f"the fleet's database does not answer: {error.orig}") from error


def _configure(connection: Any, _record: object) -> None:
    # The driver's own transactions would begin late and fail to upgrade; `_begin` takes the write lock at once.
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout = {BUSY_TIMEOUT_MS}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _integer(value: int) -> int:
    return min(value, MAX_INTEGER)


def _start(row: DeviceRow, number: int) -> None:
    """Begin session `number` on `row`, unless it is the one that runs."""
    if number > row.session:
        row.session, row.serial, row.ended = number, 0, False


def _fill(row: ModelRow, fact: link_pb2.ModelStatus) -> ModelRow:
    row.running = _integer(fact.running)
    row.running_manifest = fact.running_manifest[:MAX_TEXT]
    row.target = _integer(fact.target)
    row.phase = fact.phase[:MAX_TEXT]
    row.reason = fact.reason[:MAX_TEXT]
    row.bytes_done = _integer(fact.bytes_done)
    row.bytes_total = _integer(fact.bytes_total)
    row.failed = _integer(fact.failed)
    return row


def _known(session: Session, device: str) -> DeviceRow:
    row = session.get(DeviceRow, device)
    if row is None:
        raise NotFound(f"no device called {device!r} has been seen; `hedgerow devices` lists them")
    return row


def _device_message(row: DeviceRow) -> fleet_pb2.Device:
    return fleet_pb2.Device(
        id=row.id,
        online=row.online,
        profile=row.profile,
        hedgerow_version=row.version,
        address=row.address,
        last_seen_unix_ms=row.last_seen_unix_ms,
        trust=row.trust,
        bytes_fetched=row.bytes_fetched,
        bytes_refetched=row.bytes_refetched,
        models=[
            link_pb2.ModelStatus(
                model=model.model,
                running=model.running,
                running_manifest=model.running_manifest,
                target=model.target,
                phase=model.phase,
                reason=model.reason,
                bytes_done=model.bytes_done,
                bytes_total=model.bytes_total,
                failed=model.failed,
            )
            for model in row.models
        ],
        assigned=[fleet_pb2.Assignment(model=item.model, counter=item.counter) for item in row.assigned],
    )


def _release_message(session: Session, row: ReleaseRow) -> fleet_pb2.Release:
    assigned = select(func.count()).where(AssignmentRow.model == row.model, AssignmentRow.counter == row.counter)
    running = select(func.count()).where(
        ModelRow.model == row.model,
        ModelRow.running == row.counter,
        ModelRow.running_manifest == row.manifest_sha256,
    )
    return fleet_pb2.Release(
        model=row.model,
        counter=row.counter,
        manifest_sha256=row.manifest_sha256,
        bytes=row.bytes,
        published_unix_ms=row.published_unix_ms,
        assigned=session.scalar(assigned) or 0,
        running=session.scalar(running) or 0,
        guarantee=row.guarantee,
    )
