"""The MQTT session: one connection that comes back by itself, and the topics of a fleet.

Both ends of the link use it, and nothing else imports the MQTT client. MQTT 3.1.1, clean sessions and QoS 1 only, so
that any broker will do; nothing relies on a broker's queue. Each connection has a client of its own in a thread of its
own: what was in flight when a connection broke fails there and then with `LinkError`, and is never sent again behind
the caller's back.
"""

import asyncio
import contextlib
import logging
import random
import re
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

from paho.mqtt.client import Client, MQTTMessage, topic_matches_sub
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

from hedgerow.config import BrokerSettings
from hedgerow.errors import ConfigError, LinkError

MAX_PAYLOAD_BYTES = 120 * 2**10
"""Largest message: AWS IoT takes 128 KB. Senders stay at 60 KiB where they can; some brokers take no more. What comes
and is longer is dropped."""
MAX_METADATA_BYTES = MAX_PAYLOAD_BYTES - 2**10
"""Largest TUF metadata file: it travels in one message, in an envelope."""
CONNECT_TIMEOUT_S = 10.0
"""From opening the socket until every subscription is confirmed."""
PUBLISH_TIMEOUT_S = 10.0
DISCONNECT_TIMEOUT_S = 1.0
RECONNECT_BASE_S = 0.5
RECONNECT_MAX_S = 30.0
"""The wait before attempt n is drawn from [0, min(max, base · 2ⁿ)]: full jitter, so that a fleet spreads itself."""
STABLE_S = 10.0
"""A connection that lasted this long starts the waits afresh."""
OUTBOUND_IN_FLIGHT = 64
"""Messages sent and not yet acknowledged; further publishers wait their turn."""
INBOUND_WAITING = 256
"""Messages received and not yet handled; beyond it the socket is not read, which slows the sender."""

Handler = Callable[[str, bytes, bool], None]
"""Takes topic, payload and whether the message was retained. Runs on the event loop and must not block."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_REFUSED = 0x80  # SUBACK return code [MQTT-3.9.3]

_log = logging.getLogger(__name__)


class Will(NamedTuple):
    """What the broker publishes when the connection ends without a goodbye."""

    topic: str
    payload: bytes
    retain: bool = True


class Topics:
    """The topics of one fleet. Where a device is asked for, "+" makes the filter of all devices."""

    def __init__(self, fleet: str) -> None:
        self._prefix = f"hedgerow/{checked_id(fleet, 'fleet')}"

    def request(self, device: str) -> str:
        """Device to fleet."""
        return self._device(device, "request")

    def response(self, device: str) -> str:
        """Fleet to device."""
        return self._device(device, "response")

    def command(self, device: str) -> str:
        """Fleet to device, retained."""
        return self._device(device, "command")

    def birth(self, device: str) -> str:
        """Device to fleet, retained."""
        return self._device(device, "birth")

    def status(self, device: str) -> str:
        """Device to fleet, retained; also the last will."""
        return self._device(device, "status")

    def release_timestamp(self) -> str:
        """The retained pointer: the release repository's timestamp metadata."""
        return f"{self._prefix}/tuf/release/timestamp"

    def device_of(self, topic: str) -> str:
        """The device that a device's topic belongs to; raises `LinkError` for any other topic."""
        prefix = f"{self._prefix}/device/"
        device, _, kind = topic.removeprefix(prefix).partition("/")
        if not topic.startswith(prefix) or not _ID.fullmatch(device) or not kind:
            raise LinkError(f"{topic!r} is no device's topic")
        return device

    def _device(self, device: str, kind: str) -> str:
        return f"{self._prefix}/device/{device if device == '+' else checked_id(device, 'device')}/{kind}"


def checked_id(name: str, what: str) -> str:
    """`name` if it can be a fleet's or device's id (it becomes part of topics and paths); raises `ConfigError`."""
    if not _ID.fullmatch(name):
        raise ConfigError(
            f"{what} id {name!r}: must be 1 to 64 letters, digits, '.', '_' or '-', and begin with a letter or a digit"
        )
    return name


class Link:
    """An MQTT session over any number of connections.

    `run` does the work until it is cancelled. `will` is called before each connection, so that a will can carry that
    connection's session counter; in a worker thread, since it may have to write that down. Everything else belongs to
    one event loop.
    """

    def __init__(
        self,
        broker: BrokerSettings,
        client_id: str,
        *,
        will: Callable[[], tuple[str, bytes, bool] | None] | None = None,
        reconnect_max_s: float = RECONNECT_MAX_S,
    ) -> None:
        self._broker = broker
        self._client_id = client_id
        self._will = will
        self._reconnect_max_s = reconnect_max_s
        self._handlers: dict[str, Handler] = {}
        self._announcers: list[Callable[[], Awaitable[None]]] = []
        self._when_lost: list[Callable[[], None]] = []
        self._connection: _Connection | None = None
        self._up = asyncio.Event()
        self._in_flight = asyncio.Semaphore(OUTBOUND_IN_FLIGHT)

    @property
    def connected(self) -> bool:
        """Whether a connection stands and every subscription is confirmed."""
        return self._up.is_set()

    @property
    def address(self) -> str:
        """Host and port of the broker, for messages."""
        return f"{self._broker.host}:{self._broker.port}"

    async def wait_connected(self) -> None:
        """Return when `connected`."""
        await self._up.wait()

    def on_connected(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Have `callback` awaited after each connection and its subscriptions; it is cancelled if that connection ends.

        A `LinkError` it raises is logged; anything else ends `run`.
        """
        self._announcers.append(callback)

    def on_disconnected(self, callback: Callable[[], None]) -> None:
        """Have `callback` called when a connection ends that stood, before the next one is tried; it must not block."""
        self._when_lost.append(callback)

    def subscribe(self, topic: str, handler: Handler) -> None:
        """Have `handler` called for each message that matches the filter `topic`, over all connections.

        Messages may come twice. An exception in a handler is logged and the message is gone.
        """
        if topic in self._handlers:
            raise ValueError(f"{topic} has a handler already")
        self._handlers[topic] = handler
        if self._connection is not None:
            self._connection.subscribe(topic).add_done_callback(lambda answer: _say_refusal(topic, answer))

    async def publish(
        self, topic: str, payload: bytes, retain: bool = False, timeout_s: float = PUBLISH_TIMEOUT_S
    ) -> None:
        """Return when the broker has acknowledged the message.

        Raises `LinkError` when there is no connection, when it breaks, or after `timeout_s`; the message may have
        arrived all the same.
        """
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise LinkError(f"a message of {len(payload)} bytes is over the limit of {MAX_PAYLOAD_BYTES}")
        try:
            async with asyncio.timeout(timeout_s), self._in_flight:
                if self._connection is None:
                    raise LinkError(f"there is no connection to the broker at {self.address}")
                await self._connection.publish(topic, payload, retain)
        except TimeoutError as error:
            raise LinkError(f"the broker at {self.address} acknowledged nothing for {timeout_s:g} s") from error

    async def run(self) -> None:
        """Connect, and connect again whenever the connection is lost, until cancelled."""
        failures, down_since, first = 0, time.monotonic(), True
        while True:
            connected_at = None
            try:
                async with self._connected() as connection:
                    connected_at = time.monotonic()
                    spell = "" if first else f" again after {connected_at - down_since:.1f} s"
                    _log.info("connected to the broker at %s%s", self.address, spell)
                    first = False
                    await self._announce(connection)
            except LinkError as error:
                lasted = time.monotonic() - connected_at if connected_at else 0.0
                if connected_at or failures == 0:  # once an outage; the attempts in between are for debugging
                    _log.warning("no connection to the broker at %s: %s", self.address, error)
                else:
                    _log.debug("attempt %d to reach the broker at %s: %s", failures + 1, self.address, error)
                if connected_at:
                    down_since = time.monotonic()
                failures = 1 if lasted >= STABLE_S else failures + 1
            ceiling = min(self._reconnect_max_s, RECONNECT_BASE_S * 2 ** min(failures, 16))
            await asyncio.sleep(random.uniform(0, ceiling))  # noqa: S311  jitter is no secret

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator["_Connection"]:
        will = await asyncio.to_thread(self._will) if self._will is not None else None
        connection = _Connection(self._broker, self._client_id, will, self._dispatch)
        try:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await connection.open()
                    subscribed: set[str] = set()
                    # One more may come while the broker answers. In their order: what a message on a later topic makes
                    # its handler ask for is answered on an earlier one.
                    while missing := [topic for topic in self._handlers if topic not in subscribed]:
                        await connection.subscribed(missing[0])
                        subscribed.add(missing[0])
            except TimeoutError as error:
                raise LinkError(f"it did not answer within {CONNECT_TIMEOUT_S:g} s") from error
            self._connection = connection
            self._up.set()
            yield connection
        finally:
            self._connection = None
            if self._up.is_set():
                self._up.clear()
                for callback in self._when_lost:
                    callback()
            await connection.close()

    async def _announce(self, connection: "_Connection") -> None:
        """Run the callbacks of `on_connected` while the connection stands; raises `LinkError` when it is lost."""
        async with asyncio.TaskGroup() as tasks:
            announcing = tasks.create_task(self._call_announcers())
            reason = await connection.lost()
            announcing.cancel()
        raise LinkError(reason)

    async def _call_announcers(self) -> None:
        for callback in self._announcers:
            try:
                await callback()
            except LinkError as error:
                _log.warning("after connecting to the broker at %s: %s", self.address, error)

    def _dispatch(self, topic: str, payload: bytes, retained: bool) -> None:
        for pattern, handler in tuple(self._handlers.items()):
            if topic_matches_sub(pattern, topic):
                try:
                    handler(topic, payload, retained)
                except Exception:  # noqa: BLE001  a message must not be able to end the link, whoever sent it
                    _log.exception("a message of %d bytes on %s could not be handled", len(payload), topic)


def _say_refusal(topic: str, answer: asyncio.Future[None]) -> None:
    if not answer.cancelled() and (error := answer.exception()):
        _log.warning("subscribing to %s: %s", topic, error)


class _Client(Client):
    """The MQTT client, telling `on_fault` why its thread ends, which would otherwise be gone without a word."""

    on_fault: Callable[[str], None]

    def loop_forever(self, timeout: float = 1.0, retry_first_connection: bool = False) -> MQTTErrorCode:
        try:
            return super().loop_forever(timeout, retry_first_connection)
        except Exception as error:  # noqa: BLE001  whatever the broker sent, it costs no more than this connection
            _log.debug("the client's thread ended", exc_info=error)
            self.on_fault(f"what it sent cannot be read ({type(error).__name__})")
            return MQTTErrorCode.MQTT_ERR_PROTOCOL


class _Connection:
    """One connection and the thread that serves it. Callbacks come in that thread and are handed to the loop."""

    def __init__(
        self, broker: BrokerSettings, client_id: str, will: tuple[str, bytes, bool] | None, dispatch: Handler
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._dispatch = dispatch
        self._room = threading.BoundedSemaphore(INBOUND_WAITING)
        self._open: asyncio.Future[None] = self._loop.create_future()
        self._lost: asyncio.Future[str] = self._loop.create_future()
        self._acks: dict[int, asyncio.Future[None]] = {}
        self._client = client = _Client(
            CallbackAPIVersion.VERSION2, client_id, clean_session=True, reconnect_on_failure=False
        )
        client.on_fault = lambda reason: self._call(self._fail, reason)
        client.max_inflight_messages_set(0)  # the link bounds what is in flight, subscriptions apart
        client.max_queued_messages_set(2 * OUTBOUND_IN_FLIGHT)
        client.connect_timeout = CONNECT_TIMEOUT_S / 2
        if broker.username:
            client.username_pw_set(broker.username, broker.password)
        if broker.ca_file:
            try:
                client.tls_set(ca_certs=broker.ca_file)
            except OSError as error:
                raise ConfigError(f"broker.ca_file: {broker.ca_file} is no readable PEM file: {error}") from error
        if will is not None:
            topic, payload, retain = will
            client.will_set(topic, payload, qos=1, retain=retain)
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = lambda _client, _data, mid, _code, _properties: self._call(self._resolve, mid, "")
        client.on_subscribe = self._on_subscribe
        client.connect_async(broker.host, broker.port, broker.keepalive_s)

    async def open(self) -> None:
        """Connect; raises `LinkError` with the reason."""
        self._client.loop_start()
        await self._open

    async def lost(self) -> str:
        """Why the connection ended, once it has."""
        return await asyncio.shield(self._lost)

    def subscribe(self, topic: str) -> asyncio.Future[None]:
        """Ask for the messages of `topic`; the future is done when the broker has agreed."""
        code, mid = self._client.subscribe(topic, qos=1)
        return self._expect(code, mid)

    async def subscribed(self, topic: str) -> None:
        """Ask for the messages of `topic` and wait for the broker's yes; raises `LinkError`."""
        try:
            await self.subscribe(topic)
        except LinkError as error:
            raise LinkError(f"subscribing to {topic}: {error}") from error

    async def publish(self, topic: str, payload: bytes, retain: bool) -> None:
        """Return at the acknowledgement; raises `LinkError` when the connection breaks before."""
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        await self._expect(info.rc, info.mid)

    async def close(self) -> None:
        """Say goodbye, so that no will is sent, and end the thread."""
        client = self._client
        client.disconnect()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCONNECT_TIMEOUT_S):
                await asyncio.shield(self._lost)
        stream = client.socket()
        if isinstance(stream, socket.socket):  # the broker took no goodbye; the thread must still see the end
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
        await asyncio.to_thread(client.loop_stop)
        if isinstance(stream, socket.socket):
            stream.close()
        self._fail("the link was closed")
        for callback in ("connect", "connect_fail", "disconnect", "fault", "message", "publish", "subscribe"):
            setattr(client, f"on_{callback}", None)  # ends the cycle: sockets close now, not at some collection

    def _expect(self, code: MQTTErrorCode, mid: int | None) -> asyncio.Future[None]:
        """The acknowledgement of `mid`. It cannot come before this returns: callbacks wait for the loop's next turn."""
        future: asyncio.Future[None] = self._loop.create_future()
        if self._lost.done() or code == MQTTErrorCode.MQTT_ERR_NO_CONN or mid is None:
            future.set_exception(LinkError("the connection is lost"))
        elif code != MQTTErrorCode.MQTT_ERR_SUCCESS:
            future.set_exception(LinkError(f"too many messages wait for the broker ({code.name})"))
        else:
            self._acks[mid] = future
        return future

    def _resolve(self, mid: int, problem: str) -> None:
        future = self._acks.pop(mid, None)
        if future is not None and not future.done():
            if problem:
                future.set_exception(LinkError(problem))
            else:
                future.set_result(None)

    def _opened(self) -> None:
        if not self._open.done():
            self._open.set_result(None)

    def _fail(self, reason: str) -> None:
        if not self._lost.done():
            self._lost.set_result(reason)
        for future in (self._open, *self._acks.values()):
            if not future.done():
                future.set_exception(LinkError(reason))
        self._acks.clear()

    def _deliver(self, topic: str, payload: bytes, retained: bool) -> None:
        self._room.release()
        self._dispatch(topic, payload, retained)

    # In the client's thread:

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to tell
            self._loop.call_soon_threadsafe(function, *arguments)

    def _on_connect(
        self, _client: Client, _data: object, _flags: object, code: ReasonCode, _properties: object
    ) -> None:
        if code.is_failure:
            self._call(self._fail, f"it refused the connection: {code}")
        else:
            self._call(self._opened)

    def _on_connect_fail(self, client: Client, _data: object) -> None:
        error = sys.exc_info()[1]  # the client calls this inside its `except`
        self._call(self._fail, getattr(error, "strerror", None) or str(error))
        client.disconnect()  # or its thread would try again by itself

    def _on_disconnect(
        self, _client: Client, _data: object, _flags: object, code: ReasonCode, _properties: object
    ) -> None:
        reason = "the connection broke" if code.is_failure else "the connection was closed"
        self._call(self._fail, f"{reason} (keep-alive time-out)" if code == "Keep alive timeout" else reason)

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:  # [MQTT-1.5.3-1]; not every broker looks
            _log.debug("a message on a topic that is no text is dropped")
            return
        if len(message.payload) > MAX_PAYLOAD_BYTES:
            _log.debug("a message of %d bytes on %s is dropped", len(message.payload), topic)
            return
        self._room.acquire()
        self._call(self._deliver, topic, bytes(message.payload), message.retain)

    def _on_subscribe(
        self, _client: Client, _data: object, mid: int, codes: list[ReasonCode], _properties: object
    ) -> None:
        refused = any(code.value >= _REFUSED for code in codes)
        self._call(self._resolve, mid, "the broker refuses it" if refused else "")
