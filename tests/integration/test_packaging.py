"""What is installed where: a wheel brings all that it needs, and a device never gets ray or torch."""

import re
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

from hedgerow.config import environment

ROOT = Path(__file__).parents[2]
HEAVY = {"ray", "torch", "onnxscript", "scikit-learn", "scipy"}
REQUIREMENT = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)(\[(?P<extras>[^\]]*)\])?")


def needed(name: str, extras: frozenset[str], seen: set[tuple[str, str]]) -> set[str]:
    """The names of all packages that installing `name` with `extras` brings, as installed here."""
    found: set[str] = set()
    for requirement in declared(name):
        marker = requirement.partition(";")[2]
        asked = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        if asked and asked[1] not in extras:
            continue
        match = REQUIREMENT.match(requirement)
        assert match is not None, requirement
        child = match["name"].lower().replace("_", "-")
        child_extras = frozenset(filter(None, re.split(r"[,\s]+", match["extras"] or "")))
        found.add(child)
        if (child, ",".join(sorted(child_extras))) not in seen:
            seen.add((child, ",".join(sorted(child_extras))))
            found |= needed(child, child_extras, seen)
    return found


def declared(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:  # of another platform
        return []


@pytest.mark.parametrize("extra", ["", "edge", "openvino", "cli"])
def test_what_runs_on_a_device_never_brings_ray_or_torch(extra: str) -> None:
    brought = needed("hedgerow", frozenset({extra}), set())
    assert "grpcio" in brought
    assert not brought & HEAVY


def test_the_check_for_heavy_packages_sees_them_where_they_are() -> None:
    assert {"ray", "torch"} <= needed("hedgerow", frozenset({"cloud"}), set())


def test_a_wheel_has_the_protos_the_profiles_and_the_three_packages(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    use = (
        "import hedgerow, hedgerow_edge, hedgerow_cloud; from hedgerow import profiles;"
        "from hedgerow.proto import oip_pb2;"
        "print(hedgerow.__file__, len(profiles.known()), oip_pb2.DESCRIPTOR.name)"
    )
    told = subprocess.run(
        [sys.executable, "-c", use],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(tmp_path / "site")),
        check=True,
        capture_output=True,
        text=True,
    )
    where, profiles, proto = told.stdout.split()
    assert Path(where).is_relative_to(tmp_path / "site")
    assert int(profiles) == len(list((ROOT / "hw-profiles").glob("*.toml")))
    assert proto == "hedgerow/proto/oip.proto"


@pytest.mark.parametrize("package", ["paho", "tuf", "onnxruntime"])
def test_the_agent_without_its_extra_says_in_a_line_what_to_install(package: str, tmp_path: Path) -> None:
    (tmp_path / "mine.onnx").touch()
    (tmp_path / "edge.toml").write_text('[device]\nstate = "state"\n[models.mine]\npath = "mine.onnx"\n')
    code = f"import sys; sys.modules[{package!r}] = None; from hedgerow_edge.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--config", "edge.toml"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode != 0
    assert "Traceback" not in told.stderr
    assert "pip install 'hedgerow[edge]'" in told.stderr
