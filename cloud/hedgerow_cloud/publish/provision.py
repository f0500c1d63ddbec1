"""Making a fleet: its keys and the roots of its two repositories.

::

    <keys>/root.pem releases.pem        offline: belong on another machine, or in hardware
    <keys>/release.root.json            what the publisher trusts, and devices are given
    <keys>/director.root.json           the same of the director
    <home>/keys/online.pem director.pem online: held by the fleet service
    <home>/release/ <home>/director/    the repositories
"""

from pathlib import Path

from hedgerow.durable import write_durably
from hedgerow.errors import ConfigError
from hedgerow_cloud.publish import keys
from hedgerow_cloud.publish.repository import Director, ManifestEntry, ReleaseRepository, sign_targets

RELEASE_ROOT = "release.root.json"
DIRECTOR_ROOT = "director.root.json"


def create(offline: Path, home: Path) -> None:
    """Make the offline keys in `offline` and a fleet in `home` that trusts them; what is there already stays.

    Raises `ConfigError` if `home` belongs to other keys.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)  # keys, and samples of what people asked
    root, releases = keys.load_or_generate(offline, "root"), keys.load_or_generate(offline, "releases")
    online, directing = keys.load_or_generate(home / "keys", "online"), keys.load_or_generate(home / "keys", "director")
    if not _made(home / "release"):
        ReleaseRepository.create(home / "release", root=[root], targets=[releases], online=online)
    if not _made(home / "director"):
        Director.create(home / "director", root=[root], online=directing)
    release_repository, director = open_repositories(home)
    for name, content in {RELEASE_ROOT: release_repository.root, DIRECTOR_ROOT: director.root}.items():
        copy = offline / name
        if not copy.exists():
            write_durably(copy, content)
        elif copy.read_bytes() != content:
            raise ConfigError(f"{copy} is of another fleet than the one in {home}")


def open_repositories(home: Path) -> tuple[ReleaseRepository, Director]:
    """The repositories of the fleet in `home`; raises `ConfigError` if there is none."""
    if not (_made(home / "release") and _made(home / "director")):
        raise ConfigError(
            f"there is no fleet in {home}: make one with `hedgerow keys init --home {home} --keys FOLDER`"
        )
    return (
        ReleaseRepository(home / "release", keys.load(home / "keys", "online")),
        Director(home / "director", keys.load(home / "keys", "director")),
    )


def sign(offline: Path, current: bytes, manifest: bytes) -> bytes:
    """The targets metadata after `current`, signed with the offline keys in `offline`, that list `manifest` too."""
    try:
        root = (offline / RELEASE_ROOT).read_bytes()
    except OSError as error:
        raise ConfigError(f"no {RELEASE_ROOT} in {offline}, which `hedgerow keys init` makes with the keys") from error
    return sign_targets(root, current, [ManifestEntry.of(manifest)], [keys.load(offline, "releases")])


def _made(folder: Path) -> bool:
    return (folder / "1.root.json").exists()
