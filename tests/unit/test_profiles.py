"""Which hardware profile a machine gets."""

from pathlib import Path

import pytest

from hedgerow import engines, profiles
from hedgerow.errors import ConfigError
from hedgerow.profiles import Machine


def machine(name: str = "x86_64", *, vendor: str = "", flags: str = "", board: str = "", engine: str = "") -> Machine:
    return Machine(name, vendor, frozenset(flags.split()), board, frozenset(engine.split()))


@pytest.mark.parametrize(
    ("found", "profile"),
    [
        (machine("riscv64"), "cpu-generic"),
        (machine(flags="sse2"), "cpu-generic"),
        (machine(flags="avx2", vendor="AuthenticAMD", engine="openvino"), "cpu-x86-avx2"),
        (machine(flags="avx2 avx_vnni", vendor="GenuineIntel"), "cpu-x86-vnni"),
        (machine(flags="avx2 avx512_vnni", vendor="AuthenticAMD", engine="openvino"), "cpu-x86-vnni"),
        (machine(flags="avx2 avx512_vnni", vendor="GenuineIntel", engine="openvino"), "intel-openvino"),
        (machine("aarch64"), "cpu-arm"),
        (machine("aarch64", board="NVIDIA Jetson Orin Nano Developer Kit"), "jetson-orin"),
    ],
)
def test_the_most_special_profile_that_fits_is_taken(found: Machine, profile: str) -> None:
    assert profiles.detect(found).name == profile


def test_the_machine_is_read_from_what_the_kernel_says(tmp_path: Path) -> None:
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text(
        "processor\t: 0\nFeatures\t: fp asimd\n\nprocessor\t: 1\nFeatures\t: other\n"
    )
    (tmp_path / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson AGX Orin\0")
    found = Machine.here(tmp_path)
    assert (found.cpu_flags, found.board) == (frozenset({"fp", "asimd"}), "NVIDIA Jetson AGX Orin")
    assert Machine.here(tmp_path / "nothing").cpu_flags == frozenset()


def test_profiles_name_only_engines_that_exist() -> None:
    for profile in profiles.known().values():
        assert set(profile.engines) <= set(engines.known()), profile.name
        assert profile.precisions


def test_this_machine_has_a_profile_with_an_engine() -> None:
    assert profiles.choose().usable_engines()


def test_an_unknown_profile_is_a_wrong_setting_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="cpu-generic"):
        profiles.choose("cpu-genric")
