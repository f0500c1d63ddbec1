"""The fleet's database: stale facts, samples sent twice, releases that must not change, a file of another version."""

import itertools
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hedgerow.errors import ConfigError, InvalidRelease, NotFound, Overloaded
from hedgerow.proto.link_pb2 import Birth, ModelStatus, Sample, Status
from hedgerow.release import File, Manifest, Variant
from hedgerow_cloud.fleet.store import MAX_MODELS, Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "fleet.db", sample_bytes=4000, max_devices=3)
    yield store
    store.close()


def manifest(counter: int, sha256: str = "a" * 64) -> Manifest:
    file = File(path="m.onnx", bytes=10, sha256=sha256, chunk_bytes=16, chunks=(sha256,))
    variant = Variant(name="int8", engine="onnxruntime", precision="int8", file="m.onnx")
    return Manifest(format=1, model="digits", counter=counter, created="", variants=(variant,), files=(file,))


def running(session: int, serial: int, counter: int) -> Status:
    models = [ModelStatus(model="digits", running=counter, running_manifest="m" * 64)]
    return Status(session=session, serial=serial, online=True, models=models)


def test_a_late_status_or_will_of_an_older_session_changes_nothing(store: Store) -> None:
    store.birth("a", Birth(session=1))
    store.status("a", running(1, 5, counter=1))
    assert store.birth("a", Birth(session=2))
    assert not store.status("a", running(1, 6, counter=9))
    assert not store.status("a", Status(session=1, online=False))
    assert not store.birth("a", Birth(session=1, profile="old"))
    device = store.device("a")
    assert device.online
    assert device.models[0].running == 1
    assert device.profile == ""


def test_within_a_session_only_a_higher_serial_counts(store: Store) -> None:
    store.birth("a", Birth(session=1))
    assert store.status("a", running(1, 2, counter=2))
    assert not store.status("a", running(1, 2, counter=7))
    assert not store.status("a", running(1, 1, counter=1))
    assert store.device("a").models[0].running == 2


def test_a_will_ends_its_session_and_keeps_what_was_known_to_run(store: Store) -> None:
    store.birth("a", Birth(session=1))
    store.status("a", running(1, 9, counter=3))
    assert store.status("a", Status(session=1, online=False)), "a will is written before the statuses: serial 0"
    assert not store.status("a", running(1, 10, counter=4))
    assert not store.birth("a", Birth(session=1)), "the retained birth of a dead session brings nobody back"
    device = store.device("a")
    assert not device.online
    assert device.models[0].running == 3
    assert store.birth("a", Birth(session=2))
    assert store.device("a").online


def test_a_status_that_overtakes_its_birth_is_not_lost(store: Store) -> None:
    assert store.status("a", running(4, 1, counter=1))
    assert store.birth("a", Birth(session=4, profile="cpu"))
    device = store.device("a")
    assert (device.online, device.profile, device.models[0].running) == (True, "cpu", 1)


FACTS = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.booleans()).map(
        lambda fact: Status(session=fact[0], serial=fact[1], online=fact[2], bytes_fetched=10 * fact[0] + fact[1])
    ),
    max_size=12,
)


def test_facts_never_go_back_whatever_the_order(tmp_path: Path) -> None:
    store = Store(tmp_path / "fleet.db")
    devices = itertools.count()

    @given(facts=FACTS)
    def check(facts: list[Status]) -> None:
        device, newest = f"d{next(devices)}", (0, 0)
        for fact in facts:
            taken = store.status(device, fact)
            if taken and fact.online:
                assert (fact.session, fact.serial) > newest
            if taken:
                assert fact.session >= newest[0]
                newest = (fact.session, fact.serial if fact.online else 10)

    check()
    store.close()


def test_what_a_device_reports_is_bounded(store: Store) -> None:
    models = [ModelStatus(model=f"m{number}", phase="p" * 5000) for number in range(MAX_MODELS + 10)]
    store.status("a", Status(session=2**64 - 1, serial=2**64 - 1, online=True, models=models, trust="t" * 5000))
    device = store.device("a")
    assert len(device.models) == MAX_MODELS
    assert len(device.models[0].phase) < 5000
    assert len(device.trust) < 5000
    for name in ("b", "c"):
        store.birth(name, Birth(session=1))
    with pytest.raises(Overloaded, match="takes 3 devices"):
        store.birth("d", Birth(session=1))


def test_a_sample_is_kept_once_and_the_oldest_make_room(store: Store) -> None:
    first = [Sample(digest=f"{number:064x}", request=b"x" * 500) for number in range(4)]
    assert store.add_samples("a", "digits", first) == [sample.digest for sample in first]
    assert store.add_samples("b", "digits", first) == [sample.digest for sample in first], "had is had"
    assert [sample.digest for _, sample in store.samples("digits")] == [sample.digest for sample in first]
    store.add_samples("a", "other", first[:1])
    assert len(store.samples("other")) == 1, "the same input teaches another model too"
    store.add_samples("a", "digits", [Sample(digest="f" * 64, request=b"x" * 2500)])
    kept = [sample.digest for _, sample in store.samples("digits")]
    assert kept[-1] == "f" * 64
    assert first[0].digest not in kept
    number, _ = store.samples("digits")[0]
    assert all(later > number for later, _ in store.samples("digits", after=number))


def test_a_release_never_changes_and_counts_what_really_runs(store: Store) -> None:
    store.add_release(manifest(1), "m" * 64, 100)
    store.add_release(manifest(1), "m" * 64, 100)
    with pytest.raises(InvalidRelease, match="other content"):
        store.add_release(manifest(1, sha256="b" * 64), "n" * 64, 100)
    store.birth("a", Birth(session=1))
    store.status("a", running(1, 1, counter=1))
    store.birth("b", Birth(session=1))
    store.status("b", Status(session=1, serial=1, online=True, models=[ModelStatus(model="digits", running=1)]))
    store.assign(["a", "b"], "digits", 1)
    (release,) = store.releases("digits")
    assert (release.assigned, release.running) == (2, 1), "b runs another manifest under that number"
    assert store.blob_bytes("a" * 64) == 10
    assert store.blob_bytes("m" * 64) == 100
    assert store.blob_bytes("b" * 64) is None


def test_an_assignment_is_for_all_or_for_none_and_counts_a_command_each_time(store: Store) -> None:
    store.add_release(manifest(1), "m" * 64, 100)
    store.birth("a", Birth(session=1))
    with pytest.raises(NotFound, match="'ghost'"):
        store.assign(["a", "ghost"], "digits", 1)
    with pytest.raises(NotFound, match="digits/2"):
        store.assign(["a"], "digits", 2)
    assert store.assignments("a") == []
    assert store.commands() == {}
    store.assign(["a"], "digits", 1)
    store.assign(["a"], "digits", 1)
    assert store.assignments("a") == [("digits", 1, "m" * 64, 100)]
    assert store.commands() == {"a": 2}


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    first = Store(tmp_path / "fleet.db")
    first.birth("a", Birth(session=7, profile="cpu"))
    first.add_release(manifest(1), "m" * 64, 100)
    first.assign(["a"], "digits", 1)
    first.close()
    second = Store(tmp_path / "fleet.db")
    assert second.device("a").assigned[0].counter == 1
    assert not second.birth("a", Birth(session=6)), "the session is remembered"
    second.close()


@pytest.mark.parametrize("fault", ["not a database", "another schema"])
def test_a_file_that_is_not_ours_is_named_and_left_alone(fault: str, tmp_path: Path) -> None:
    file = tmp_path / "fleet.db"
    if fault == "not a database":
        file.write_bytes(b"hello " * 500)
    else:
        connection = sqlite3.connect(file)
        connection.execute("PRAGMA user_version = 99")
        connection.close()
    with pytest.raises(ConfigError, match=r"fleet\.db"):
        Store(file)
    if fault == "not a database":
        assert file.read_bytes() == b"hello " * 500
    else:
        connection = sqlite3.connect(file)
        assert connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
        connection.close()
