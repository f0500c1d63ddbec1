"""What the device must not forget: who it is, its session counter, the install journal, version floor and outbox.

::

    <state>/device-id    who this device is, as text
    <state>/lock         held by the process that uses the folder
    <state>/state.db     SQLite: what a call has written survives a power cut
    <state>/slots/       the releases: see `hedgerow_edge.slots`

A database that cannot be read is set aside and begun anew: the journal and the version floor are rebuilt from the
slots' markers; the waiting samples and the list of rejected releases are lost.

Calls block on the disk; coroutines use them through `asyncio.to_thread`.
"""

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from hedgerow.durable import hold, write_durably
from hedgerow.errors import ConfigError
from hedgerow_edge.install import Install
from hedgerow_edge.slots import Slots

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 5.0
"""How long a call waits for another process that reads the database, a person's sqlite3 for example."""
DATABASE = "state.db"

_SCHEMA = """
create table meta (key text primary key, value text not null) without rowid;
create table installs (
    model text primary key,
    phase text not null,      -- for people; the truth is in `state`
    state text not null       -- hedgerow_edge.install.Install as JSON
) without rowid;
create table floors (name text primary key, version integer not null) without rowid;
create table samples (
    number integer primary key autoincrement,
    digest text not null,
    model text not null,
    content blob not null,    -- hedgerow.v1.Sample
    unique (model, digest)
);
create table sent (digest text, model text, number integer primary key autoincrement, unique (model, digest));
"""

_log = logging.getLogger(__name__)


class Outboxed(NamedTuple):
    """A sample that waits. `content` is a serialised `hedgerow.v1.Sample`, `digest` the one inside it."""

    model: str
    digest: str
    content: bytes


class Store:
    """The state of one device in `folder`, made if it is missing. Safe to call from any thread.

    Raises `ConfigError` if the folder cannot be used or was written by a newer version, and `sqlite3.Error` from any
    call when the disk is full or failing; nothing was changed then.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.slots = Slots(folder / "slots")
        self._session = 0
        self.lost = ""
        """Why the state had to be begun anew; empty if it was not."""
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # samples are nobody else's business
            self._held = hold(folder / "lock")
        except BlockingIOError as error:
            raise ConfigError(f"device.state: another agent uses {folder}") from error
        except OSError as error:
            raise ConfigError(f"device.state: the state folder {folder} cannot be used: {error}") from error
        try:
            self._database = self._open_or_begin_anew(folder / DATABASE)
            self._rebuild()
        except sqlite3.Error as error:
            self._held.close()
            raise ConfigError(f"device.state: {folder / DATABASE} cannot be used: {error}") from error
        except BaseException:
            self._held.close()
            raise

    def close(self) -> None:
        """Let go of the database; idempotent."""
        with self._lock:
            self._database.close()
            self._held.close()

    # Identity and sessions

    def device_id(self, configured: str, generate: str) -> str:
        """`configured` if there is one, else what was kept, else `generate`, which is kept from now on."""
        file = self.folder / "device-id"
        if configured:
            return configured
        with contextlib.suppress(FileNotFoundError):
            if kept := file.read_text(encoding="utf-8").strip():
                return kept
        try:
            write_durably(file, f"{generate}\n".encode())
        except OSError as error:
            raise ConfigError(f"device.state: an id cannot be written to {self.folder}: {error.strerror}") from error
        return generate

    def next_session(self) -> int:
        """The number of a new session: larger than all before, also if it cannot be kept.

        A store that begins anew starts from the clock, so that its sessions are still newer than those it forgot.
        """
        last = self._session
        with contextlib.suppress(sqlite3.Error):  # what fails here fails below too, and is said there
            last = max(last, self.counter("session"))
        self._session = last + 1 if last else max(1, int(time.time()))
        try:
            self.set_counters({"session": self._session})
        except sqlite3.Error as error:  # a full, failing or locked disk must not cost the link
            _log.warning("the session number cannot be kept: %s", error)
        return self._session

    def counter(self, name: str) -> int:
        """A number kept by `set_counters`; 0 if it was not."""
        with self._lock:
            row = self._database.execute("select value from meta where key = ?", (name,)).fetchone()
        return int(row[0]) if row else 0

    def set_counters(self, values: Mapping[str, int]) -> None:
        """Keep numbers by name."""
        with self._transaction() as database:
            database.executemany(
                "insert or replace into meta values (?, ?)", [(name, str(value)) for name, value in values.items()]
            )

    # The journal and the version floor

    def installs(self) -> dict[str, Install]:
        """Every model's machine as it was last saved."""
        with self._lock:
            rows = self._database.execute("select model, state from installs order by model").fetchall()
        return {model: msgspec.json.decode(state, type=Install) for model, state in rows}

    def save(self, model: str, install: Install) -> None:
        """Write `install` to the journal and, in the same transaction, note its floor under the model's name."""
        state = msgspec.json.encode(install).decode()
        with self._transaction() as database:
            database.execute("insert or replace into installs values (?, ?, ?)", (model, install.phase, state))
            _raise_floor(database, {model: install.floor})

    def floor(self, name: str) -> int:
        """The highest version noted for `name`; 0 if there is none (`hedgerow_edge.trust.VersionFloor`)."""
        with self._lock:
            row = self._database.execute("select version from floors where name = ?", (name,)).fetchone()
        return int(row[0]) if row else 0

    def raise_floor(self, versions: Mapping[str, int]) -> None:
        """Note `versions`; one that is lower than what is noted changes nothing."""
        with self._transaction() as database:
            _raise_floor(database, versions)

    # The outbox

    def add_samples(self, samples: Sequence[Outboxed], *, max_count: int, max_bytes: int) -> int:
        """Keep samples, but for those kept or sent before; how many of the oldest were dropped to make room."""
        with self._transaction() as database:
            database.executemany(
                "insert into samples (model, digest, content) select ?1, ?2, ?3"
                " where not exists (select 1 from sent where model = ?1 and digest = ?2)"
                " on conflict (model, digest) do nothing",
                samples,
            )
            doomed, count, size = [], 0, 0
            for number, content_bytes in database.execute(
                "select number, length(content) from samples order by number desc"
            ):
                count, size = count + 1, size + content_bytes
                if count > max_count or size > max_bytes:
                    doomed.append((number,))
            database.executemany("delete from samples where number = ?", doomed)
        return len(doomed)

    def oldest_samples(self, max_bytes: int, overhead_bytes: int) -> list[Outboxed]:
        """The oldest sample and those of its model after it, as many as fit `max_bytes`; empty if none waits.

        Each is counted with `overhead_bytes` on top. The first is there even if it does not fit.
        """
        batch: list[Outboxed] = []
        size = 0
        with self._lock:
            for row in self._database.execute(
                "select model, digest, content from samples"
                " where model = (select model from samples order by number limit 1) order by number"
            ):
                sample = Outboxed(*row)
                size += len(sample.content) + overhead_bytes
                if batch and size > max_bytes:
                    break
                batch.append(sample)
        return batch

    def forget_samples(self, model: str, digests: Collection[str], *, remember: int) -> int:
        """Drop samples that have arrived, and remember the last `remember` digests; how many were dropped."""
        with self._transaction() as database:
            pairs = [(model, digest) for digest in digests]
            before = database.total_changes
            database.executemany("delete from samples where model = ? and digest = ?", pairs)
            dropped = database.total_changes - before
            database.executemany("insert or ignore into sent (model, digest) values (?, ?)", pairs)
            database.execute("delete from sent where number <= (select max(number) from sent) - ?", (remember,))
        return dropped

    def delete_samples(self) -> int:
        """Empty the outbox unsent; how many samples were in it."""
        with self._transaction() as database:
            return database.execute("delete from samples").rowcount

    def samples_waiting(self) -> int:
        """How many samples are in the outbox."""
        with self._lock:
            return int(self._database.execute("select count(*) from samples").fetchone()[0])

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("begin immediate")
            try:
                yield self._database
                self._database.execute("commit")
            except BaseException:
                if self._database.in_transaction:  # a full disk may have rolled back already
                    self._database.execute("rollback")
                raise

    def _open_or_begin_anew(self, file: Path) -> sqlite3.Connection:
        """The database; an unreadable one is first set aside for people to look at."""
        try:
            return _open(file)
        except sqlite3.OperationalError:  # full, locked, not writable: the content may be fine
            raise
        except sqlite3.DatabaseError as error:
            self.lost = str(error)
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        for old in (file, file.with_name(f"{file.name}-journal")):
            if old.exists():
                old.rename(old.with_name(f"{old.name}.broken-{stamp}"))
        _log.error(
            "%s is unreadable (%s) and was set aside; waiting samples and the list of rejected releases are lost",
            file.name,
            self.lost,
        )
        return _open(file)

    def _rebuild(self) -> None:
        """Take from the slots' markers what the journal should know and does not: it was lost."""
        known = self.installs()
        for model in self.slots.models():
            releases = self.slots.confirmed(model)
            if releases and model not in known:
                active, previous = releases[0], releases[1] if releases[1:] else None
                self.save(model, Install(active=active, previous=previous, floor=active.counter))
                _log.warning("%s/%d was confirmed here: the journal has it again", model, active.counter)


def _raise_floor(database: sqlite3.Connection, versions: Mapping[str, int]) -> None:
    database.executemany(
        "insert into floors values (?, ?) on conflict (name) do update set version = max(version, excluded.version)",
        versions.items(),
    )


def _open(file: Path) -> sqlite3.Connection:
    """The database, whole and of our schema; raises `sqlite3.DatabaseError` for one that is damaged."""
    database = sqlite3.connect(file, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        # A rollback journal, not WAL, whose shared-memory file must be written before anything can be read: a device
        # that restarts with a full disk has to find its models. EXTRA syncs the folder too when a transaction ends.
        database.execute("pragma journal_mode = delete")
        database.execute("pragma synchronous = extra")
        _check(database, file)
    except BaseException:
        database.close()
        raise
    return database


def _check(database: sqlite3.Connection, file: Path) -> None:
    (found,) = database.execute("pragma user_version").fetchone()
    if found > SCHEMA_VERSION:
        raise ConfigError(
            f"device.state: {file} has schema {found}, made by a newer Hedgerow; this one knows {SCHEMA_VERSION}"
        )
    if found == 0:
        database.executescript(f"begin; {_SCHEMA} pragma user_version = {SCHEMA_VERSION}; commit;")
    (verdict,) = database.execute("pragma quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(verdict)
    try:
        for (state,) in database.execute("select state from installs"):
            msgspec.json.decode(state, type=Install)
    except msgspec.DecodeError as error:
        raise sqlite3.DatabaseError(f"the install journal cannot be read: {error}") from error
