"""The releases on disk: two slots a model, and a marker on each that holds a confirmed release.

::

    slots/<model>/{a,b}/            one release: manifest.json and the files that this device needs
    slots/<model>/{a,b}.confirmed   there while the slot holds a release that passed its probation: which one

What a slot is for is the journal's to say. The markers double what the journal knows of confirmed releases, so that
losing the database does not cost the models.

Everything here blocks on the disk and is synced before it returns.
"""

import hashlib
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hedgerow.durable import sync_folder, write_durably
from hedgerow.errors import InvalidRelease
from hedgerow.release import MANIFEST, File, Manifest, Variant, describe, parse
from hedgerow_edge.install import SLOTS, Release

_MODEL = re.compile(r"[A-Za-z0-9_-]{1,128}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Held:
    """A release that is whole in its slot, and the variant of it for this device."""

    manifest: Manifest
    variant: Variant
    folder: Path


class Slots:
    """The two places of each model on disk. What a slot holds is the journal's to say; this only keeps it safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, model: str, slot: str) -> Path:
        """The folder of a slot; raises `InvalidRelease` for a model's name that cannot be a folder's."""
        if not _MODEL.fullmatch(model) or slot not in SLOTS:
            raise InvalidRelease(f"{model!r} cannot be the name of a model")
        return self._folder / model / slot

    def models(self) -> list[str]:
        """The models that have slots."""
        if not self._folder.is_dir():
            return []
        return sorted(entry.name for entry in self._folder.iterdir() if _MODEL.fullmatch(entry.name))

    def prepare(self, model: str, target: Release) -> Path:
        """Make the target's slot ready to be filled, keeping what is there if it is of the same release.

        First the slot stops being confirmed, then its files go. Returns its folder.
        """
        path = self.path(model, target.slot)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._marker(path).unlink(missing_ok=True)
        sync_folder(path.parent)
        if _sha256(path / MANIFEST) != target.manifest:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        for folder in (path.parent, self._folder, self._folder.parent):
            sync_folder(folder)
        return path

    def read(self, model: str, release: Release) -> Held:
        """The release that is in its slot, every file of it that this device uses checked by digest.

        Raises `InvalidRelease` naming what is missing or changed.
        """
        path = self.path(model, release.slot)
        if (found := _sha256(path / MANIFEST)) != release.manifest:
            raise InvalidRelease(
                f"{model}/{release.counter}: the manifest in slot {release.slot} "
                + (f"has sha256 {found[:12]}…, not {release.manifest[:12]}…" if found else "is missing")
            )
        manifest = parse((path / MANIFEST).read_bytes())
        held = Held(manifest=manifest, variant=_variant(manifest, release.variant), folder=path)
        for file in needed(manifest, held.variant):
            try:
                found_file = describe(path, file.path, file.chunk_bytes)
            except OSError as error:
                raise InvalidRelease(f"{manifest.name}: {file.path} cannot be read: {error.strerror}") from error
            if found_file != file:
                raise InvalidRelease(
                    f"{manifest.name}: {file.path} in slot {release.slot} has sha256 {found_file.sha256[:12]}…, "
                    f"the manifest says {file.sha256[:12]}…"
                )
        return held

    def confirm(self, model: str, release: Release) -> None:
        """Mark a slot's release as one that passed its probation."""
        marker, content = self._marker(self.path(model, release.slot)), msgspec.json.encode(release)
        if not marker.exists() or marker.read_bytes() != content:
            write_durably(marker, content)

    def confirmed(self, model: str) -> list[Release]:
        """The releases that the markers name, the newest first."""
        found = []
        for slot in SLOTS:
            marker = self._marker(self.path(model, slot))
            try:
                release = msgspec.json.decode(marker.read_bytes(), type=Release)
            except FileNotFoundError:
                continue
            except (OSError, msgspec.DecodeError) as error:
                _log.warning("%s is unreadable: %s", marker, error)
                continue
            if release.slot == slot:
                found.append(release)
        return sorted(found, key=lambda release: -release.counter)

    @staticmethod
    def _marker(path: Path) -> Path:
        return path.with_name(f"{path.name}.confirmed")


def needed(manifest: Manifest, variant: Variant) -> list[File]:
    """The files that a device with `variant` uses; the other variants stay where they are."""
    paths = (variant.file, manifest.probes.file if manifest.probes else None, manifest.card)
    return [manifest.file(path) for path in dict.fromkeys(path for path in paths if path)]


def _variant(manifest: Manifest, name: str) -> Variant:
    for variant in manifest.variants:
        if variant.name == name:
            return variant
    raise InvalidRelease(f"{manifest.name} has no variant {name!r}")


def _sha256(file: Path) -> str:
    """Hex digest; empty if the file cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return ""
