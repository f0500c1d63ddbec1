"""The installer over a real store and a real host: what becomes of an active release that does not load."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from simulators import models

from hedgerow import engines, release
from hedgerow.engines import onnxruntime
from hedgerow.host.model_host import ModelHost
from hedgerow.release import MANIFEST, Manifest, Variant
from hedgerow.router import Router
from hedgerow_edge.install import Install, Release
from hedgerow_edge.installer import Installer, UpdateSettings
from hedgerow_edge.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A device that has confirmed digits/1 and then digits/2."""
    with closing(Store(tmp_path / "state")) as store:
        previous, active = held(store, 1, "a"), held(store, 2, "b")
        store.save("digits", Install(active=active, previous=previous, floor=2))
        yield store


def held(store: Store, counter: int, slot: str) -> Release:
    """A release, whole in its slot."""
    folder = store.slots.prepare("digits", Release(counter=counter, manifest="new", slot=slot))
    models.classifier(folder / "student.onnx", shift=counter)
    variant = Variant(name="cpu", engine="onnxruntime", precision="fp32", file="student.onnx")
    files = (release.describe(folder, "student.onnx"),)
    manifest = Manifest(
        format=release.FORMAT, model="digits", counter=counter, created="", variants=(variant,), files=files
    )
    (folder / MANIFEST).write_bytes(manifest.encode())
    digest = release.describe(folder, MANIFEST).sha256
    return Release(counter=counter, manifest=digest, slot=slot, variant="cpu")


def installer_of(store: Store, host: ModelHost) -> Installer:
    return Installer(
        store,
        host,
        Router({}),
        UpdateSettings(),
        profile="cpu-generic",
        engines=("onnxruntime",),
        admit=lambda _model: None,
        on_change=lambda: None,
    )


def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_installed", lambda _engine: False)


def out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_model(path: Path, **_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(onnxruntime, "open_model", open_model)


@pytest.mark.parametrize(
    ("hinder", "words"),
    [(not_installed, "the engine onnxruntime is not installed"), (out_of_memory, "out of memory")],
)
async def test_an_active_release_that_cannot_be_loaded_for_now_stays_active_and_is_tried_again(
    store: Store,
    caplog: pytest.LogCaptureFixture,
    hinder: Callable[[pytest.MonkeyPatch], None],
    words: str,
) -> None:
    host, before = ModelHost(), store.installs()
    with pytest.MonkeyPatch.context() as patch:
        hinder(patch)
        installer = installer_of(store, host)
        await installer.recover()
        await installer.finish_begun()
        (status,) = installer.status()
        assert (status.running, status.phase, status.failed) == (0, "idle", 0)
        assert f"digits/2 cannot be loaded now: {words}" in status.reason
        assert caplog.text.count("cannot be loaded now") == 1
        assert store.installs() == before
        again = installer_of(store, host)  # another start
        await again.recover()
    for one in (installer, again):
        await one.finish_begun()  # as at each check
        (status,) = one.status()
        assert (status.running, status.reason) == (2, "")
    assert await host.ready("digits", "2")
    await host.close()


async def test_an_active_release_whose_files_are_damaged_gives_way_to_the_one_before_it(store: Store) -> None:
    host = ModelHost()
    (store.slots.path("digits", "b") / "student.onnx").write_bytes(b"rotten")
    installer = installer_of(store, host)
    await installer.recover()
    (status,) = installer.status()
    assert status.running == 1
    assert "student.onnx in slot b has sha256" in status.reason
    active = store.installs()["digits"].active
    assert active is not None
    assert active.counter == 1
    await host.close()
