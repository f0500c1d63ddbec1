"""The link over real brokers: what a device and the fleet rely on when connections, brokers and processes go."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from simulators import brokers

from hedgerow.config import BrokerSettings
from hedgerow.errors import ConfigError, LinkError
from hedgerow.link import MAX_PAYLOAD_BYTES, Link, Topics, Will, _Connection
from hedgerow_cloud.local.broker import free_port

TOPICS = Topics("test.fleet")
WAIT_S = 20
SUBSCRIBERS = 10


@asynccontextmanager
async def running(link: Link) -> AsyncIterator[Link]:
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(link.run())
        async with asyncio.timeout(WAIT_S):
            await link.wait_connected()
        yield link
        task.cancel()


def link_to(broker: brokers.Broker, name: str) -> Link:
    return Link(brokers.settings(broker), name, reconnect_max_s=0.5)


class Inbox:
    """What came on a topic."""

    def __init__(self, link: Link, topic: str) -> None:
        self.queue: asyncio.Queue[tuple[str, bytes, bool]] = asyncio.Queue()
        link.subscribe(topic, lambda *message: self.queue.put_nowait(message))

    async def next(self, timeout_s: float = WAIT_S) -> tuple[str, bytes, bool]:
        async with asyncio.timeout(timeout_s):
            return await self.queue.get()


async def test_a_message_of_60_kib_reaches_exactly_its_subscribers(broker: brokers.Broker) -> None:
    device, fleet = link_to(broker, "dev-1"), link_to(broker, "fleet")
    requests, mine = Inbox(fleet, TOPICS.request("+")), Inbox(device, TOPICS.response("dev-1"))
    other = Inbox(device, TOPICS.response("dev-2"))
    payload = os.urandom(60 * 2**10)
    async with running(device), running(fleet):
        await device.publish(TOPICS.request("dev-1"), payload)
        topic, content, retained = await requests.next()
        assert TOPICS.device_of(topic) == "dev-1"
        assert content == payload
        assert not retained
        await asyncio.gather(*(fleet.publish(TOPICS.response("dev-1"), bytes([n]) * 48 * 2**10) for n in range(200)))
        assert {(await mine.next())[1][0] for _ in range(200)} == set(range(200))
        assert other.queue.empty()
        with pytest.raises(LinkError, match="over the limit"):
            await device.publish(TOPICS.request("dev-1"), bytes(MAX_PAYLOAD_BYTES + 1))


async def test_a_topic_that_is_added_while_connecting_is_not_forgotten(
    broker: brokers.Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = link_to(broker, "dev-1")
    early, late = Inbox(link, TOPICS.command("dev-1")), list[Inbox]()
    subscribed = _Connection.subscribed

    async def meanwhile(connection: _Connection, topic: str) -> None:
        await subscribed(connection, topic)
        if not late:
            late.append(Inbox(link, TOPICS.response("dev-1")))

    monkeypatch.setattr(_Connection, "subscribed", meanwhile)
    async with running(link):
        for topic, inbox in ((TOPICS.command("dev-1"), early), (TOPICS.response("dev-1"), late[0])):
            await link.publish(topic, b"hello")
            assert (await inbox.next(5))[1] == b"hello"


async def test_a_message_on_a_topic_that_is_no_text_costs_nothing() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                kind, length = await reader.readexactly(2)
                body = await reader.readexactly(length)
                if kind & 0xF0 == 0x10:
                    writer.write(b"\x20\x02\x00\x00")
                elif kind & 0xF0 == 0x80:
                    writer.write(b"\x90\x03" + body[:2] + b"\x01")
                    writer.write(b"\x30\x04\x00\x01\xffx" + b"\x30\x04\x00\x01ax")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        link = Link(BrokerSettings(port=server.sockets[0].getsockname()[1]), "dev-1")
        inbox = Inbox(link, "a")
        async with running(link):
            assert await inbox.next() == ("a", b"x", False)


async def test_whatever_ends_the_clients_thread_ends_a_connection_and_not_the_link(
    broker: brokers.Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_message, seen = _Connection._on_message, []

    def failing_once(connection: _Connection, *arguments: Any) -> None:
        seen.append(arguments)
        if len(seen) == 1:
            raise MemoryError
        on_message(connection, *arguments)

    monkeypatch.setattr(_Connection, "_on_message", failing_once)
    device = link_to(broker, "dev-1")
    inbox = Inbox(device, TOPICS.command("dev-1"))
    async with running(link_to(broker, "fleet")) as fleet, running(device):
        await fleet.publish(TOPICS.command("dev-1"), b"news", retain=True)
        assert (await inbox.next())[1] == b"news"
        assert len(seen) > 1


async def test_a_will_that_takes_its_time_does_not_hold_up_the_loop(broker: brokers.Broker) -> None:
    threads: list[threading.Thread] = []

    def will() -> Will:
        threads.append(threading.current_thread())
        return Will(TOPICS.status("dev-1"), b"gone")

    async with running(Link(brokers.settings(broker), "dev-1", will=will)):
        assert threading.main_thread() not in threads


async def test_a_retained_message_waits_for_who_comes_later_and_survives_a_restart(broker: brokers.Broker) -> None:
    async with running(link_to(broker, "fleet")) as fleet:
        await fleet.publish(TOPICS.command("dev-1"), b"old", retain=True)
        await fleet.publish(TOPICS.command("dev-1"), b"check", retain=True)
    await broker.stop()
    await broker.start()
    # Who subscribes in the embedded broker's first moments may be told nothing; who comes later is told.
    for attempt in range(SUBSCRIBERS):
        device = link_to(broker, f"dev-{attempt}")
        commands = Inbox(device, TOPICS.command("dev-1"))
        async with running(device):
            with contextlib.suppress(TimeoutError):
                assert await commands.next(WAIT_S / SUBSCRIBERS) == (TOPICS.command("dev-1"), b"check", True)
                return
    pytest.fail(f"no retained message reached any of {SUBSCRIBERS} subscribers after the restart")


async def test_subscriptions_and_callbacks_come_back_after_the_broker_was_killed(
    broker: brokers.Broker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hedgerow.link")
    device, fleet = link_to(broker, "dev-1"), link_to(broker, "fleet")
    births, announced = Inbox(fleet, TOPICS.birth("+")), 0

    async def announce() -> None:
        nonlocal announced
        announced += 1
        await device.publish(TOPICS.birth("dev-1"), str(announced).encode(), retain=True)

    device.on_connected(announce)
    async with running(fleet), running(device):
        assert (await births.next())[1] == b"1"
        lost = asyncio.Event(), asyncio.Event()
        device.on_disconnected(lost[0].set)
        fleet.on_disconnected(lost[1].set)
        await broker.kill()
        await asyncio.wait_for(asyncio.gather(*(event.wait() for event in lost)), WAIT_S)
        assert not device.connected
        assert not fleet.connected
        with pytest.raises(LinkError, match="no connection"):
            await device.publish(TOPICS.birth("dev-1"), b"lost")
        await asyncio.sleep(1)  # the outage lasts for several attempts
        await broker.start()
        await asyncio.wait_for(asyncio.gather(device.wait_connected(), fleet.wait_connected()), WAIT_S)
        while int((await births.next())[1]) < 2:
            pass
    lines = [record.getMessage() for record in caplog.records if record.levelname in {"INFO", "WARNING"}]
    assert sum(line.startswith("no connection") for line in lines) == 2, lines  # an outage is said once by each
    assert sum("again after" in line for line in lines) == 2, lines


async def test_a_publication_in_flight_fails_at_once_when_the_broker_dies_and_in_time_when_it_hangs(
    broker: brokers.Broker,
) -> None:
    async with running(link_to(broker, "dev-1")) as device:
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGSTOP)
        os.waitpid(broker.pid, os.WUNTRACED)  # noqa: ASYNC222  until every thread of it stands still
        with pytest.raises(LinkError, match="acknowledged nothing"):
            await device.publish(TOPICS.birth("dev-1"), b"x", timeout_s=0.3)
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(outcome(device.publish(TOPICS.birth("dev-1"), b"y", timeout_s=WAIT_S)))
            await asyncio.sleep(0.1)
            await broker.kill()
            assert await asyncio.wait_for(waiting, 5) is not None


async def outcome(publication: Awaitable[None]) -> LinkError | None:
    try:
        await publication
    except LinkError as error:
        return error
    return None


async def test_a_will_comes_when_the_process_is_killed_and_not_after_a_goodbye(
    broker: brokers.Broker, tmp_path: Path
) -> None:
    script = tmp_path / "device.py"
    script.write_text(
        "import asyncio, sys\n"
        "from hedgerow.config import BrokerSettings\n"
        "from hedgerow.link import Link, Will\n"
        "link = Link(BrokerSettings(port=int(sys.argv[1]), keepalive_s=2), 'dev-9',"
        " will=lambda: Will(sys.argv[2], b'gone'))\n"
        "async def up():\n"
        "    print('up', flush=True)\n"
        "link.on_connected(up)\n"
        "asyncio.run(link.run())\n"
    )
    fleet, sessions = link_to(broker, "fleet"), iter(range(7, 99))
    statuses = Inbox(fleet, TOPICS.status("+"))
    polite = Link(
        brokers.settings(broker), "dev-1", will=lambda: Will(TOPICS.status("dev-1"), str(next(sessions)).encode())
    )
    async with running(fleet):
        async with running(polite):
            pass
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(script), str(broker.port), TOPICS.status("dev-9"), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.readline(), WAIT_S) == b"up\n"
        process.kill()
        await process.wait()
        assert (await statuses.next())[:2] == (TOPICS.status("dev-9"), b"gone")
        assert statuses.queue.empty()
        async with running(polite):  # each connection asks for its will: this one is the second
            broken = break_connection(polite)
            assert (await statuses.next())[:2] == (TOPICS.status("dev-1"), b"8")
            await until_back(polite, broken)
            break_connection(polite)
            assert (await statuses.next())[:2] == (TOPICS.status("dev-1"), b"9")


def break_connection(link: Link) -> _Connection:
    """End the TCP connection with no word to the broker, as a lost network does; returns what it ended."""
    connection = link._connection
    assert connection is not None
    stream = connection._client.socket()
    assert isinstance(stream, socket.socket)
    stream.shutdown(socket.SHUT_RDWR)
    return connection


async def until_back(link: Link, broken: _Connection) -> None:
    """Return when another connection than `broken` stands, which may be before anybody looks."""
    async with asyncio.timeout(WAIT_S):
        while link._connection in {None, broken}:  # noqa: ASYNC110  there is no event for another connection
            await asyncio.sleep(0.01)


@pytest.mark.filterwarnings(  # paho leaves the socket of a failed handshake to the collector
    "ignore:.*SSLSocket:pytest.PytestUnraisableExceptionWarning"
)
async def test_with_a_ca_file_only_a_broker_that_it_vouches_for_is_spoken_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if reason := brokers.missing("mosquitto"):
        pytest.skip(reason)
    caplog.set_level("DEBUG", "hedgerow.link")
    certificate, key = self_signed(tmp_path / "broker")
    stranger, _ = self_signed(tmp_path / "stranger")
    broker = brokers.Mosquitto(tmp_path / "mosquitto", f"certfile {certificate}", f"keyfile {key}")
    await broker.start()
    try:
        known = BrokerSettings(port=broker.port, ca_file=str(certificate))
        async with running(Link(known, "dev-1")) as device:
            await device.publish(TOPICS.birth("dev-1"), b"x" * 60 * 2**10)
        unknown = BrokerSettings(port=broker.port, ca_file=str(stranger))
        async with asyncio.TaskGroup() as tasks:
            link = Link(unknown, "dev-1", reconnect_max_s=0.1)
            task = tasks.create_task(link.run())
            await asyncio.sleep(0.5)
            assert not link.connected
            task.cancel()
        assert "certificate verify failed" in caplog.text
    finally:
        await broker.stop()
    with pytest.raises(ConfigError, match=r"broker\.ca_file"):
        await Link(BrokerSettings(ca_file=str(tmp_path / "none.pem")), "dev-1").run()


def self_signed(path: Path) -> tuple[Path, Path]:
    """Files with a certificate for 127.0.0.1 that vouches for itself, and its key."""
    key, name = ed25519.Ed25519PrivateKey.generate(), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, path.name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .sign(key, None)
    )
    files = path.with_suffix(".crt"), path.with_suffix(".key")
    files[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


async def test_without_a_broker_nothing_hangs() -> None:
    link = Link(BrokerSettings(port=free_port()), "dev-1", reconnect_max_s=0.1)
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(link.run())
        with pytest.raises(LinkError, match="no connection"):
            await link.publish(TOPICS.birth("dev-1"), b"x")
        await asyncio.sleep(0.3)
        assert not link.connected
        task.cancel()


def test_an_id_cannot_reach_into_other_topics() -> None:
    for name in ("", "a/b", "+", "#", "..", ".hidden", "ä", "x" * 65, "a b", "a\n"):
        with pytest.raises(ConfigError, match="fleet id"):
            Topics(name)
        if name != "+":  # the filter of all devices
            with pytest.raises(ConfigError, match="device id"):
                TOPICS.response(name)
