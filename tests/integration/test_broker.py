"""The embedded broker as a daemon: what it must not expose, and how it begins and ends."""

import asyncio
import signal
import socket
import sys
from pathlib import Path

import pytest

from hedgerow.errors import ConfigError, Unavailable
from hedgerow_cloud.local.broker import EmbeddedBroker, configure, free_port


def listening(pid: int) -> set[str]:
    """Addresses that the process listens on, as the kernel tells them (IPv4 and IPv6, hex)."""
    inodes = {link.readlink().name for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in inodes:
                found.add(local.partition(":")[0])
    return found


async def test_it_listens_on_loopback_only_and_ends_at_sigterm(tmp_path: Path) -> None:
    port = free_port()
    code = f"from hedgerow_cloud.local import broker; broker.run(broker.Path({str(tmp_path)!r}), {port})"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    try:
        async with asyncio.timeout(20):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    break
                except OSError:
                    await asyncio.sleep(0.05)
        assert listening(process.pid) == {"0100007F"}
        writer.close()
        await writer.wait_closed()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_taken_port_is_said_and_not_mistaken_for_the_broker(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        broker = EmbeddedBroker(tmp_path, other.getsockname()[1])
        with pytest.raises(Unavailable, match="is taken"):
            await broker.start()
        assert broker.pid is None


async def test_a_broker_that_cannot_start_names_its_log(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("not a folder")
    with pytest.raises(Unavailable, match=r"see broker\.log"):
        await EmbeddedBroker(tmp_path).start()


def test_a_folder_or_port_that_cannot_be_configured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must not contain quotes"):
        configure(tmp_path / 'a"b', 1883)
    with pytest.raises(ConfigError, match="port"):
        configure(tmp_path, 0)
