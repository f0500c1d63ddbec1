"""`scripts/oip-conformance`: a good server passes, a bad one fails, and a fault that is listed is shown, not fatal."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract.conformance import TYPED
from simulators.background import in_background

from hedgerow import __version__
from hedgerow.config import ServerSettings
from hedgerow.function import FunctionBackend, FunctionModel
from hedgerow.server import Server
from hedgerow.tensors import ModelMetadata, TensorSpec

COMMAND = Path(__file__).parents[2] / "scripts" / "oip-conformance"
EVERY = tuple(TensorSpec(datatype, datatype, (-1, 2)) for datatype in (*TYPED, "FP16", "BF16"))
ROW = (TensorSpec("x", "FP32", (-1, 2)),)
BROKEN_RULE = "without a choice every output comes and fits the metadata"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    def model(name: str, specs: tuple[TensorSpec, ...], function: Any) -> FunctionModel:
        return FunctionModel(ModelMetadata(name, ("1",), "python", specs, specs), function)

    backend = FunctionBackend(
        model("echo", EVERY, lambda inputs: inputs),
        model("liar", ROW, lambda inputs: {"x": np.zeros((1, 1, 3), np.float32)}),
    )
    with in_background(lambda: Server(backend, ServerSettings(port=0))) as server:
        yield server.address


def judged(*arguments: object) -> tuple[int, dict[str, dict[str, str]]]:
    """The exit code, and the verdicts by rule."""
    done = subprocess.run([COMMAND, *map(str, arguments), "--json"], capture_output=True, check=False)
    return done.returncode, {one["rule"]: one for one in json.loads(done.stdout)} if done.stdout else {}


def test_a_good_server_passes_with_inputs_made_from_the_metadata_of_every_datatype(address: str) -> None:
    code, verdicts = judged(address, "--model=echo")
    assert not [one for one in verdicts.values() if one["outcome"] == "FAIL"]
    assert sum(one["outcome"] == "pass" for one in verdicts.values()) > 50
    assert code == 0


def test_a_broken_must_fails_and_a_listed_one_is_shown_and_forgiven(address: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((3, 2), np.float32))
    arguments = (address, "--model=liar", f"--input=x={tmp_path / 'x.npy'}")
    code, verdicts = judged(*arguments)
    assert code == 1
    assert (verdicts[BROKEN_RULE]["level"], verdicts[BROKEN_RULE]["outcome"]) == ("MUST", "FAIL")
    assert verdicts[BROKEN_RULE]["reason"]

    failed = [rule for rule, one in verdicts.items() if one["outcome"] == "FAIL"]
    listed = tmp_path / "faults.toml"
    lines = [
        f'["hedgerow {__version__}"]',
        *(f'"{rule}" = "it lies"' for rule in failed),
        '"the answer names the model" = "x"',
    ]
    listed.write_text("\n".join(lines), encoding="utf-8")
    code, verdicts = judged(*arguments, f"--peer-faults={listed}")
    assert code == 0
    assert verdicts[BROKEN_RULE]["outcome"] == "known fault"
    assert verdicts["the answer names the model"]["outcome"] == "listed, but gone"


def test_a_server_or_model_that_is_not_there_cannot_be_judged(address: str) -> None:
    assert judged(address, "--model=no-such-model") == (2, {})
