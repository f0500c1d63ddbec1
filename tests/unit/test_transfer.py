"""What a transfer must survive: wrong bytes, doubled bytes, silence, kills and a full disk."""

import asyncio
import errno
import os
import random
import signal
import sys
import threading
from hashlib import sha256
from pathlib import Path

import pytest
from simulators import slow_fetch
from simulators.publisher import Publisher, Source

from hedgerow.errors import InvalidRelease, LinkError, TransferFailed
from hedgerow.proto.link_pb2 import Chunk, ChunkRequest
from hedgerow.release import CHUNK_BYTES, File
from hedgerow_edge import transfer
from hedgerow_edge.transfer import Counts, Transfer, bitmap
from hedgerow_edge.trust import Assigned

CHUNKS = 40
CONTENT = random.Random(7).randbytes((CHUNKS - 1) * CHUNK_BYTES + 4321)


class Bench:
    """One published file and the device that fetches it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.publisher = Publisher(folder / "fleet")
        self.file: File = self.publisher.make("digits", 1, CONTENT).files[0]
        self.source = Source(self.publisher)
        self.into = folder / "slot" / "0.onnx"
        self.into.parent.mkdir()

    @property
    def part(self) -> Path:
        return self.folder / "parts" / f"{self.file.sha256}.part"

    def transfer(self, stall_limit_s: float = 60) -> Transfer:
        return Transfer(self.folder / "parts", self.source, stall_limit_s=stall_limit_s)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(transfer, "RETRY_BASE_S", 0.001)
    return Bench(tmp_path)


def flipped(chunk: Chunk, index: int) -> Chunk:
    if chunk.index != index:
        return chunk
    content = bytearray(chunk.content)
    content[17] ^= 1
    return Chunk(sha256=chunk.sha256, index=index, content=bytes(content))


async def test_a_file_arrives_whole_once_and_in_place(bench: Bench) -> None:
    seen: list[tuple[int, int]] = []
    one = bench.transfer()
    await one.fetch(bench.file, bench.into, lambda done, total: seen.append((done, total)))
    assert bench.into.read_bytes() == CONTENT
    assert one.counts == (len(CONTENT), 0)
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert not bench.part.exists()
    asked = len(bench.source.requests)
    assert asked == -(-CHUNKS // transfer.WINDOW_CHUNKS)
    await one.fetch(bench.file, bench.into)  # it is there
    assert len(bench.source.requests) == asked
    empty = bench.publisher.make("empty", 1, b"").files[0]
    await one.fetch(empty, bench.into.with_name("empty"))
    assert bench.into.with_name("empty").read_bytes() == b""


async def test_a_flipped_byte_is_refused_and_the_chunk_named(bench: Bench) -> None:
    bench.source.spoil = lambda chunks: [flipped(chunk, 21) for chunk in chunks]
    one = bench.transfer()
    with pytest.raises(TransferFailed) as failure:
        await one.fetch(bench.file, bench.into)
    wrong = sha256(flipped(bench.publisher.chunks(_request(bench.file, 21))[0], 21).content).hexdigest()
    assert str(failure.value) == (
        f"0.onnx: chunk 21 has sha256 {wrong[:12]}…, the manifest says {bench.file.chunks[21][:12]}… (3 attempts)"
    )
    assert not bench.into.exists()
    bench.source.spoil = lambda chunks: chunks
    await one.fetch(bench.file, bench.into)  # what was right was kept
    assert one.counts.fetched - one.counts.refetched == len(CONTENT) + 3 * CHUNK_BYTES


def _request(file: File, *indices: int) -> ChunkRequest:
    return ChunkRequest(sha256=file.sha256, chunk_bytes=file.chunk_bytes, missing=bitmap(indices), window=len(indices))


async def test_one_wrong_chunk_heals(bench: Bench) -> None:
    spoiled = iter([True])
    bench.source.spoil = lambda chunks: [flipped(chunk, 3) for chunk in chunks] if next(spoiled, False) else chunks
    await bench.transfer().fetch(bench.file, bench.into)
    assert bench.into.read_bytes() == CONTENT


async def test_lost_doubled_shuffled_and_foreign_chunks_do_no_harm_and_are_counted(bench: Bench) -> None:
    dice = random.Random(3)
    doubled = 0

    def spoil(chunks: list[Chunk]) -> list[Chunk]:
        nonlocal doubled
        arrived = [chunk for chunk in chunks if dice.random() > 0.3]
        twice = [chunk for chunk in arrived if dice.random() < 0.2]
        doubled += sum(len(chunk.content) for chunk in twice)
        foreign = [
            Chunk(sha256="ab" * 32, index=0, content=b"x" * CHUNK_BYTES),
            Chunk(sha256=bench.file.sha256, index=2**40, content=b"x"),
            Chunk(sha256=bench.file.sha256, index=CHUNKS - 1, content=b"x" * CHUNK_BYTES),
        ]
        sent = arrived + twice + foreign
        dice.shuffle(sent)
        return sent

    bench.source.spoil = spoil
    one = bench.transfer()
    await one.fetch(bench.file, bench.into)
    assert bench.into.read_bytes() == CONTENT
    assert doubled > 0
    assert one.counts == (len(CONTENT) + doubled, doubled)
    windows = [request.window for request in bench.source.requests]
    assert min(windows) < transfer.WINDOW_CHUNKS  # loss makes it ask for less at once


async def test_silence_ends_as_the_links_error_and_what_came_is_kept(bench: Bench) -> None:
    windows = 0

    def fall_silent(chunks: list[Chunk]) -> list[Chunk]:
        nonlocal windows
        windows += 1
        return chunks if windows == 1 else []

    bench.source.spoil = fall_silent
    one = bench.transfer(stall_limit_s=0.05)
    with pytest.raises(LinkError, match=r"0\.onnx: nothing new came for"):
        await one.fetch(bench.file, bench.into)
    bench.source.spoil = lambda chunks: chunks
    two = bench.transfer()  # another process, as it were
    await two.fetch(bench.file, bench.into)
    assert one.counts.fetched + two.counts.fetched == len(CONTENT)
    assert two.counts.refetched == 0


async def test_a_lost_connection_is_waited_for_and_the_transfer_goes_on_the_moment_it_is_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "RETRY_BASE_S", 1000)
    monkeypatch.setattr(transfer, "RETRY_MAX_S", 1000)

    lost = asyncio.Event()

    def lose_the_connection(chunks: list[Chunk]) -> list[Chunk]:
        bench.source.up.clear()
        lost.set()
        return chunks[:3]

    bench.source.spoil = lose_the_connection
    with pytest.raises(LinkError, match=r"0\.onnx: nothing new came for 0 s: there is no connection"):
        await bench.transfer(stall_limit_s=0.05).fetch(bench.file, bench.into)
    bench.source.up.set()
    lost.clear()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(bench.transfer().fetch(bench.file, bench.into))
        await lost.wait()
        asked = len(bench.source.requests)
        bench.source.spoil = lambda chunks: chunks
        await asyncio.sleep(0.1)  # some time without a connection
        assert len(bench.source.requests) == asked, "nobody is asked while nobody hears"
        bench.source.up.set()
    assert bench.into.read_bytes() == CONTENT


async def test_what_came_is_counted_on_and_kept_with_each_window(bench: Bench) -> None:
    kept, threads = [], set()

    def keep(counts: Counts) -> None:
        kept.append(counts)
        threads.add(threading.current_thread())

    one = bench.transfer()
    one.count_on(Counts(1000, 10), keep)
    await one.fetch(bench.file, bench.into)
    assert len(kept) == len(bench.source.requests) > 2
    assert kept == sorted(kept)
    assert kept[-1] == one.counts == (1000 + len(CONTENT), 10)
    assert threading.main_thread() not in threads


async def test_torn_and_rotten_parts_are_fetched_again(bench: Bench) -> None:
    bench.part.parent.mkdir()
    rotten = bytearray(CONTENT[: 20 * CHUNK_BYTES + 100])
    rotten[5 * CHUNK_BYTES] ^= 1
    bench.part.write_bytes(bytes(rotten))  # chunk 5 flipped, 20 torn, the rest not there
    one = bench.transfer()
    await one.fetch(bench.file, bench.into)
    assert bench.into.read_bytes() == CONTENT
    assert one.counts.fetched == len(CONTENT) - 19 * CHUNK_BYTES


async def test_a_killed_process_goes_on_where_it_was(bench: Bench) -> None:
    (bench.folder / "content").write_bytes(CONTENT)
    process = await asyncio.create_subprocess_exec(
        sys.executable, slow_fetch.__file__, str(bench.folder), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(20):
        while int(await process.stdout.readline()) < len(CONTENT) // 2:
            pass
    process.send_signal(signal.SIGKILL)
    await process.wait()
    assert not bench.into.exists()
    one = bench.transfer()
    await one.fetch(bench.file, bench.into)
    assert bench.into.read_bytes() == CONTENT
    assert 0 < one.counts.fetched <= len(CONTENT) // 2
    assert one.counts.refetched == 0


async def test_a_full_disk_is_said_before_anything_is_asked_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(TransferFailed, match=r"0\.onnx: this device's disk is full"):
            await bench.transfer().fetch(bench.file, bench.into)
    assert not bench.source.requests
    assert bench.part.stat().st_size == 0  # what was to be had of the disk is given back
    await bench.transfer().fetch(bench.file, bench.into)


async def test_progress_is_only_told_in_the_thread_of_the_event_loop(bench: Bench) -> None:
    threads, told = set(), []

    def progress(done: int, size: int) -> None:
        threads.add(threading.current_thread())
        told.append((done, size))

    await bench.transfer().fetch(bench.file, bench.into, progress)
    assert (told[0], told[-1]) == ((0, len(CONTENT)), (len(CONTENT), len(CONTENT)))
    assert threads == {threading.main_thread()}


async def test_what_the_fleet_does_not_have_fails_with_its_reason(bench: Bench) -> None:
    bench.publisher.files.clear()
    with pytest.raises(TransferFailed, match=r"0\.onnx: no file with sha256"):
        await bench.transfer().fetch(bench.file, bench.into)


async def test_a_manifest_is_what_was_signed_or_nothing(bench: Bench) -> None:
    entry = bench.publisher.publish("digits", 2, CONTENT, b"probes")
    assigned = Assigned("digits", 2, entry.sha256, entry.size)
    into = bench.into.with_name("manifest.json")
    bench.source.spoil = lambda chunks: [flipped(chunk, 0) for chunk in chunks]
    one = bench.transfer()
    with pytest.raises(TransferFailed, match=r"the manifest of digits/2 has sha256 .* was signed"):
        await one.manifest(assigned, into)
    assert not into.exists()
    bench.source.spoil = lambda chunks: chunks
    manifest = await one.manifest(assigned, into)
    assert [file.bytes for file in manifest.files] == [len(CONTENT), 6]
    bench.source.silent = True
    assert await one.manifest(assigned, into) == manifest  # it is there
    with pytest.raises(InvalidRelease, match="signed as digits/3 says it is digits/2"):
        await one.manifest(Assigned("digits", 3, entry.sha256, entry.size), into)
    with pytest.raises(InvalidRelease, match="at most"):
        await one.manifest(Assigned("digits", 3, "ab" * 32, 2**40))


async def test_parts_of_releases_that_nobody_wants_any_more_go(bench: Bench) -> None:
    bench.part.parent.mkdir()
    bench.part.write_bytes(b"x")
    other = bench.part.with_name("abcd.part")
    other.write_bytes(b"y")
    bench.transfer().prune({bench.file.sha256})
    assert bench.part.exists()
    assert not other.exists()
