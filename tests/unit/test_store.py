"""What the device must not forget, and what is left when the disk forgets for it."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hedgerow.errors import ConfigError, InvalidRelease
from hedgerow_edge.install import Install, Phase, Release
from hedgerow_edge.store import DATABASE, SCHEMA_VERSION, Outboxed, Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "state")) as store:
        yield store


def again(store: Store) -> Store:
    store.close()
    return Store(store.folder)


def release(counter: int, slot: str) -> Release:
    return Release(counter=counter, manifest=f"{counter:064x}", slot=slot, variant="cpu")


def sample(number: int, size: int = 10, model: str = "digits") -> Outboxed:
    return Outboxed(model, f"{number:064x}", bytes([number]) * size)


def keep(store: Store, *samples: Outboxed, max_count: int = 100, max_bytes: int = 10_000) -> int:
    return store.add_samples(samples, max_count=max_count, max_bytes=max_bytes)


def test_the_journal_comes_back_as_it_was_and_its_floor_with_it(store: Store) -> None:
    install = Install(phase=Phase.PROBATION, active=release(2, "a"), target=release(3, "b"), floor=2, crashes=1)
    store.save("digits", install)
    store.save("other", Install())
    with closing(again(store)) as later:
        assert later.installs() == {"digits": install, "other": Install()}
        assert later.floor("digits") == 2


def test_a_floor_is_never_lowered(store: Store) -> None:
    store.raise_floor({"digits": 5, "release/root": 2})
    store.raise_floor({"digits": 3, "release/root": 4})
    store.save("digits", Install(floor=1))
    assert (store.floor("digits"), store.floor("release/root"), store.floor("unknown")) == (5, 4, 0)


def test_sessions_grow_over_restarts_and_lost_databases_and_full_disks(store: Store) -> None:
    first = store.next_session()
    assert first >= time.time() - 60
    with closing(again(store)) as later:
        assert later.next_session() == first + 1
        later._database.execute("pragma query_only = on")  # as a full disk: it can be read
        assert [later.next_session(), later.next_session()] == [first + 2, first + 3]


def test_a_database_that_somebody_locks_does_not_cost_the_link(store: Store) -> None:
    first = store.next_session()
    store._database.execute("pragma busy_timeout = 0")
    with closing(sqlite3.connect(store.folder / DATABASE, isolation_level=None)) as person:
        person.execute("begin exclusive")
        assert [store.next_session(), store.next_session()] == [first + 1, first + 2]
    assert store.next_session() == first + 3


def test_nobody_else_can_read_what_waits(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "state")) as store:
        assert store.folder.stat().st_mode & 0o077 == 0


def test_a_device_keeps_the_id_it_made_up(store: Store) -> None:
    assert store.device_id("", "edge-7") == "edge-7"
    with closing(again(store)) as later:
        assert later.device_id("", "edge-8") == "edge-7"
        assert later.device_id("set", "edge-8") == "set"


def test_two_agents_cannot_use_one_folder(store: Store) -> None:
    with pytest.raises(ConfigError, match="another agent"):
        Store(store.folder)


def test_a_folder_of_a_newer_version_is_left_alone(store: Store) -> None:
    store._database.execute(f"pragma user_version = {SCHEMA_VERSION + 1}")
    store.close()
    with pytest.raises(ConfigError, match="newer"):
        Store(store.folder)
    assert not list(store.folder.glob("*.broken-*"))


@pytest.mark.parametrize("damage", ["header", "page", "journal entry", "empty"])
def test_an_unreadable_database_is_set_aside_and_rebuilt_from_the_slots(store: Store, damage: str) -> None:
    store.save("digits", Install(active=release(2, "b"), floor=2))
    for one in (release(1, "a"), release(2, "b")):
        store.slots.prepare("digits", one)
        store.slots.confirm("digits", one)
    store.slots.prepare("other", release(1, "a"))  # begun, never confirmed
    session = store.next_session()
    if damage == "journal entry":
        store._database.execute("update installs set state = '{'")
    store.close()
    file = store.folder / DATABASE
    content = bytearray(file.read_bytes())
    if damage == "header":
        content[:16] = b"not a database!!"
    elif damage == "page":
        content[4096 : len(content)] = b"\xff" * (len(content) - 4096)
    file.write_bytes(b"\xff" * 512 if damage == "empty" else content)

    with closing(Store(store.folder)) as later:
        assert later.lost
        rebuilt = Install(active=release(2, "b"), previous=release(1, "a"), floor=2)
        assert later.installs() == {"digits": rebuilt}
        assert later.floor("digits") == 2
        assert later.next_session() >= session
    assert list(store.folder.glob(f"{DATABASE}.broken-*"))


def test_a_slot_stops_being_confirmed_before_anything_else_is_put_into_it(store: Store) -> None:
    first = release(1, "a")
    folder = store.slots.prepare("digits", first)
    (folder / "student.onnx").write_bytes(b"old")
    store.slots.confirm("digits", first)
    assert store.slots.confirmed("digits") == [first]
    folder = store.slots.prepare("digits", release(3, "a"))
    assert list(folder.iterdir()) == []
    assert store.slots.confirmed("digits") == []


@pytest.mark.parametrize("name", ["..", "a/b", "", ".", "a\0", "x" * 200])
def test_a_models_name_cannot_lead_out_of_the_slots(store: Store, name: str) -> None:
    with pytest.raises(InvalidRelease, match="cannot be the name"):
        store.slots.prepare(name, release(1, "a"))


def test_the_outbox_holds_each_sample_once_and_the_newest_when_it_is_full(store: Store) -> None:
    assert keep(store, sample(1), sample(1), sample(2)) == 0
    assert store.samples_waiting() == 2
    assert keep(store, sample(3), sample(4), max_count=3) == 1
    assert [one.digest for one in store.oldest_samples(1000, 0)] == [sample(n).digest for n in (2, 3, 4)]
    assert keep(store, sample(5, size=20), max_bytes=35) == 2
    assert [one.digest for one in store.oldest_samples(1000, 0)] == [sample(n).digest for n in (4, 5)]


def test_samples_travel_oldest_first_by_model_and_fit_the_message(store: Store) -> None:
    keep(store, sample(1), sample(2, model="other"), sample(3), sample(4))
    assert [one.digest for one in store.oldest_samples(24, 2)] == [sample(1).digest, sample(3).digest]
    assert [one.digest for one in store.oldest_samples(1, 2)] == [sample(1).digest]


def test_what_has_arrived_is_forgotten_and_not_sent_again(store: Store) -> None:
    keep(store, sample(1), sample(2))
    assert store.forget_samples("digits", [sample(1).digest], remember=1) == 1
    assert keep(store, sample(1)) == 0
    assert [one.digest for one in store.oldest_samples(1000, 0)] == [sample(2).digest]
    store.forget_samples("digits", [sample(2).digest], remember=1)  # the memory is bounded
    keep(store, sample(1), sample(2))
    assert [one.digest for one in store.oldest_samples(1000, 0)] == [sample(1).digest]


def test_a_write_that_fails_changes_nothing(store: Store) -> None:
    keep(store, sample(1))
    with pytest.raises(sqlite3.Error):
        keep(store, sample(2), Outboxed("digits", "x", None))  # type: ignore[arg-type]  # breaks "not null"
    assert [one.digest for one in store.oldest_samples(1000, 0)] == [sample(1).digest]
