"""Puts a kind to all `probes`, each failed one followed by a fresh server."""

import asyncio
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from bench.transports.kinds import KINDS
from bench.transports.probes import PATIENT, PROBES, ROOMY, Probe
from bench.transports.running import Running, running
from faults.attacks import KNOWN, MAX_MESSAGE_BYTES
from simulators import http2, victims
from simulators.victims import Victim

PATIENCE_S = 10.0
"""For one answer."""
LIMIT_S = 180.0
"""For one probe."""
REASON_CHARS = 160
PLAN: tuple[tuple[Mapping[str, Probe], Mapping[str, object]], ...] = (
    (ROOMY, {}),
    (PATIENT, {"keepalive_s": 2.0}),
    (PROBES, {"max_message_bytes": MAX_MESSAGE_BYTES}),
)
"""Which probes meet a server with which settings."""


def examined(kind: str, packages: Path, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """By probe: `ok`, and a remark. What our own fault tests list for a transport is taken from there, not run."""
    http2.WAIT_S = victims.WAIT_S = PATIENCE_S
    found: dict[str, dict[str, Any]] = {}
    for probes, settings in PLAN:
        left = dict(probes)
        for name in tuple(left):
            if reason := KNOWN.get(KINDS[kind].transport, {}).get(name):
                found[name] = {"ok": False, "remark": f"listed: {reason}"}
                del left[name]
        while left:
            with running(kind, packages, **settings) as server:
                _until_one_fails(server, left, found)
        say(f"  {sum(not one['ok'] for one in found.values())} of {len(found)} failed")
    return found


def _until_one_fails(server: Running, left: dict[str, Probe], found: dict[str, dict[str, Any]]) -> None:
    for name in tuple(left):
        found[name] = asyncio.run(_outcome(left.pop(name), server))
        if not found[name]["ok"] or not server.process.running:
            return


async def _outcome(probe: Probe, server: Running) -> dict[str, Any]:
    victim = Victim(server.address, cast("Any", None))
    try:
        async with asyncio.timeout(LIMIT_S):
            remark = await probe(server, victim)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is what was found)
        return {"ok": False, "remark": " ".join(f"{type(error).__name__}: {error}".split())[:REASON_CHARS]}
    return {"ok": True, "remark": remark or ""}


def versions(*packages: str) -> list[str]:
    """As pip writes them."""
    return [f"{package}=={version(package)}" for package in packages]
