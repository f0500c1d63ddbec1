"""Hardware profiles: what a kind of hardware can do, and which kind this machine is.

A profile is a TOML file in ``hw-profiles/`` (packaged as ``hedgerow/_hw_profiles``), named for the kind. A new profile
is a new file there.
"""

import functools
import platform
import tomllib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hedgerow import engines
from hedgerow.config import Settings
from hedgerow.errors import ConfigError

PACKAGED = Path(__file__).parent / "_hw_profiles"
CHECKOUT = Path(__file__).parents[2] / "hw-profiles"


class Match(Settings, frozen=True, kw_only=True):
    """What a machine must have for a profile to fit; empty fields ask for nothing."""

    machines: tuple[str, ...] = ()
    """Any of these, as `platform.machine` says it."""
    cpu_vendor: str = ""
    cpu_flags: tuple[tuple[str, ...], ...] = ()
    """Of each group any one, as /proc/cpuinfo names them."""
    board: str = ""
    """Part of the board's model, as the device tree names it."""
    engine: str = ""
    """An engine that must be installed."""


class Profile(Settings, frozen=True, kw_only=True):
    """A kind of hardware. Of several that fit a machine, the one with the highest `rank` is meant."""

    name: str
    description: str
    rank: int
    engines: tuple[str, ...]
    """In order of preference."""
    precisions: tuple[str, ...]
    """In order of preference."""
    memory_mb: int
    """The least memory (MiB) that a device of this kind has."""
    int8_reduce_range: bool = False
    """Whether int8 weights must be kept to 7 bits, because the CPU's 16-bit sums would saturate."""
    power_modes: tuple[str, ...] = ()
    """What the board can be set to, as its tool names them."""
    match: Match = Match()

    def usable_engines(self) -> tuple[str, ...]:
        """Those of its engines that are installed here, in its order."""
        installed = engines.available()
        return tuple(engine for engine in self.engines if engine in installed)


@dataclass(frozen=True, slots=True)
class Machine:
    """What can be told of a machine without asking its drivers."""

    machine: str
    cpu_vendor: str
    cpu_flags: frozenset[str]
    board: str
    engines: frozenset[str]

    @classmethod
    def here(cls, root: Path = Path("/")) -> "Machine":
        """The one we run on; what the files under `root` do not say stays empty."""
        cpu: dict[str, str] = {}
        for line in _text(root / "proc/cpuinfo").splitlines():
            key, _, value = line.partition(":")
            cpu.setdefault(key.strip(), value.strip())
        # x86 says "flags", ARM says "Features".
        flags = frozenset((cpu.get("flags") or cpu.get("Features") or "").split())
        board = _text(root / "proc/device-tree/model").rstrip("\0")
        return cls(platform.machine(), cpu.get("vendor_id", ""), flags, board, frozenset(engines.available()))

    def fits(self, match: Match) -> bool:
        """Whether this machine has all that `match` asks for."""
        return (
            (not match.machines or self.machine in match.machines)
            and (not match.cpu_vendor or self.cpu_vendor == match.cpu_vendor)
            and all(self.cpu_flags.intersection(group) for group in match.cpu_flags)
            and match.board in self.board
            and (not match.engine or match.engine in self.engines)
        )


@functools.cache
def known() -> dict[str, Profile]:
    """All profiles by name; raises `ConfigError` for a file that is none."""
    folder = PACKAGED if PACKAGED.is_dir() else CHECKOUT
    return {file.stem: _read(file) for file in sorted(folder.glob("*.toml"))}


def load(name: str) -> Profile:
    """The profile called `name`; raises `ConfigError` if there is none."""
    if name not in known():
        raise ConfigError(f"there is no hardware profile {name!r}; there are: {', '.join(known())}")
    return known()[name]


def detect(machine: Machine | None = None) -> Profile:
    """The profile that fits this machine (or `machine`) best. `cpu-generic` fits every machine."""
    machine = machine or Machine.here()
    return max((p for p in known().values() if machine.fits(p.match)), key=lambda profile: profile.rank)


def choose(name: str = "") -> Profile:
    """The profile called `name`, or without a name the one that fits this machine; raises `ConfigError`."""
    return load(name) if name else detect()


def _read(file: Path) -> Profile:
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
        return msgspec.convert({"name": file.stem, **content}, Profile)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"hardware profile {file.stem}: {error}") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
