"""What is installed, what this machine is, and what can be reached: the checks of `hedgerow doctor`."""

import importlib.metadata
import platform
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONNECT_TIMEOUT_S = 1.0
LOW_DISK_BYTES = 2 * 2**30
OPTIONAL = ("dev", "all")
"""Extras that nobody misses: one is for working on Hedgerow, the other is the sum of the rest."""

_EXTRA = re.compile(r"extra\s*==\s*['\"]([\w-]+)['\"]")
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `fix` is what to do about it; empty when there is nothing to do."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def examine(home: Path, fleet: str, server: str) -> Iterator[Check]:
    """Every check in turn; `fleet` and `server` are "host:port"."""
    yield Check("python", ok=True, detail=f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _packages()
    yield from _hardware()
    yield _disk(home)
    yield _reach("fleet service", fleet)
    yield _reach("inference server", server)


def _packages() -> Iterator[Check]:
    needed: dict[str, list[str]] = {"core": []}
    for requirement in importlib.metadata.requires("hedgerow") or []:
        name, marker = _NAME.match(requirement), _EXTRA.search(requirement)
        if name is not None:
            needed.setdefault(marker[1] if marker else "core", []).append(name[0])
    for extra, names in needed.items():
        if extra in OPTIONAL:
            continue
        versions = {name: _version(name) for name in sorted(names)}
        missing = [name for name, version in versions.items() if not version]
        here = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        package = "hedgerow" if extra == "core" else f"hedgerow[{extra}]"
        yield Check(
            f"extra {extra}" if extra != "core" else "core",
            ok=not missing,
            detail=here if not missing else f"missing: {', '.join(missing)}",
            fix=f"pip install '{package}'" if missing else "",
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _hardware() -> Iterator[Check]:
    from hedgerow import engines, profiles

    available = engines.available()
    yield Check(
        "engines",
        ok=bool(available),
        detail=", ".join(available) if available else "none",
        fix="" if available else "pip install 'hedgerow[edge]'",
    )
    profile = profiles.detect()
    wanted = ", ".join(profile.engines)
    usable = ", ".join(profile.usable_engines()) or "none"
    yield Check("profile", ok=True, detail=f"{profile.name}: prefers {wanted}; usable here: {usable}")


def _disk(home: Path) -> Check:
    folder = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(folder).free
    ok = free >= LOW_DISK_BYTES
    return Check("disk", ok=ok, detail=f"{free / 2**30:.1f} GiB free at {home}", fix="" if ok else "make room")


def _reach(what: str, target: str) -> Check:
    host, _, port = target.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return Check(what, ok=False, detail=f"{target}: {reason}", fix="`hedgerow up` starts everything here")
    return Check(what, ok=True, detail=f"{target} accepts connections")
