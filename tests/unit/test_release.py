"""What a release's manifest may say: what is wrong or means harm is refused by name before anything is opened."""

import hashlib
from pathlib import Path

import msgspec
import pytest

from hedgerow import release
from hedgerow.errors import InvalidRelease
from hedgerow.release import MAX_CHUNK_BYTES, MAX_COUNTER, File, Manifest, Variant

CONTENT = b"a model"


def manifest(**file: object) -> Manifest:
    digest = hashlib.sha256(CONTENT).hexdigest()
    fields = {"path": "m.onnx", "bytes": len(CONTENT), "sha256": digest, "chunk_bytes": 4096, "chunks": (digest,)}
    described = msgspec.convert({**fields, **file}, File)
    variant = Variant(name="v", engine="onnxruntime", precision="fp32", file=described.path)
    return Manifest(format=1, model="digits", counter=1, created="", variants=(variant,), files=(described,))


def test_a_release_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(CONTENT)
    written = msgspec.structs.replace(manifest(), labels=("none", "", "cat"))
    (tmp_path / release.MANIFEST).write_bytes(written.encode())
    assert release.read(tmp_path) == written
    assert release.describe(tmp_path, "m.onnx", 4096) == written.files[0]
    (tmp_path / "m.onnx").write_bytes(CONTENT[::-1])
    with pytest.raises(InvalidRelease, match=r"m\.onnx has sha256"):
        release.read(tmp_path)


@pytest.mark.parametrize(
    "path", ["", ".", "..", "/etc/passwd", "../m.onnx", "a/../m.onnx", "./m.onnx", "a//b", "a/", "a\\b", "a\0b"]
)
def test_no_file_lies_outside_the_release_or_is_the_release(path: str) -> None:
    with pytest.raises(InvalidRelease, match="not a plain path"):
        release.parse(manifest(path=path).encode())


@pytest.mark.parametrize("chunk_bytes", [-1, 0, MAX_CHUNK_BYTES + 1, 2**46, 2**63])
def test_no_more_is_allocated_than_a_chunk_may_have(chunk_bytes: int) -> None:
    with pytest.raises(InvalidRelease, match=f"chunks of {chunk_bytes} bytes"):
        release.parse(manifest(chunk_bytes=chunk_bytes).encode())


@pytest.mark.parametrize("counter", [-1, 0, MAX_COUNTER + 1, 10**30])
def test_a_counter_is_one_that_can_be_stored(counter: int) -> None:
    content = manifest().encode().replace(b'"counter": 1,', b'"counter": %d,' % counter)
    with pytest.raises(InvalidRelease, match="counter"):
        release.parse(content)


@pytest.mark.parametrize("model", ["", "a/b", "..", "modèle", "\u0661", "m" * 65, "digits\n"])
def test_a_models_name_is_one_that_devices_take(model: str) -> None:
    with pytest.raises(InvalidRelease, match="the model's name"):
        release.parse(msgspec.structs.replace(manifest(), model=model).encode())


def test_a_digest_cannot_lead_to_another_file() -> None:
    for wrong in ({"sha256": "../" * 20 + "tmp/x"}, {"chunks": ("",)}):
        with pytest.raises(InvalidRelease, match=r"m\.onnx: a digest"):
            release.parse(manifest(**wrong).encode())


def test_a_variant_is_found_again_by_its_name() -> None:
    one = manifest()
    twice = msgspec.structs.replace(one, variants=(*one.variants, *one.variants))
    with pytest.raises(InvalidRelease, match="two variants"):
        release.parse(twice.encode())


def test_a_label_that_would_shift_the_others_is_refused() -> None:
    wrong = msgspec.structs.replace(manifest(), labels=("tench, Tinca tinca", "goldfish"))
    with pytest.raises(InvalidRelease, match="'tench, Tinca tinca'"):
        release.parse(wrong.encode())
