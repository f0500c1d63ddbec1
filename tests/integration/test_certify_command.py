"""``hedgerow certify`` on two models that were trained on the digits: files, and a large one behind a server."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper
from simulators import models
from simulators.background import in_background
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from hedgerow.config import ServerSettings, environment
from hedgerow.gate import Guarantee, covers
from hedgerow.host.model_host import ModelHost
from hedgerow.host.settings import HostSettings, ModelFile
from hedgerow.server import Server

HEDGEROW = [sys.executable, "-m", "hedgerow_cloud.cli.main"]
SEED, TRAINED_ON, SHAKEN = 5, 800, 3
NOISE = 2.0


def dense(path: Path, layers: list[tuple[np.ndarray, np.ndarray]]) -> Path:
    """`image` (n, 64) to `logits` (n, 10) through fully connected `layers`."""
    nodes, weights, name = list[Any](), dict[str, np.ndarray[Any, Any]](), "image"
    for number, (weight, bias) in enumerate(layers):
        last = number == len(layers) - 1
        weights |= {f"w{number}": weight.astype(np.float32), f"b{number}": bias.astype(np.float32)}
        after = "logits" if last else f"h{number}"
        nodes.append(helper.make_node("Gemm", [name, f"w{number}", f"b{number}"], [after]))
        if not last:
            nodes.append(helper.make_node("Relu", [after], [f"r{number}"]))
        name = f"r{number}"
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 64])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10])
    return models.save(path, nodes, [image], [logits], **weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small.onnx`, `large.onnx`, and `calibration.npz` with labels, of digits that neither has seen."""
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(SEED)
    digits = load_digits()
    order = rng.permutation(len(digits.data))
    images, labels = digits.data[order].astype(np.float32) / 16, digits.target[order]
    few = slice(0, TRAINED_ON // 4)
    small = LogisticRegression(max_iter=2000).fit(images[few], labels[few])
    large = MLPClassifier((64,), max_iter=2000, random_state=SEED).fit(images[:TRAINED_ON], labels[:TRAINED_ON])
    dense(folder / "small.onnx", [(small.coef_.T, small.intercept_)])
    dense(folder / "large.onnx", list(zip(large.coefs_, large.intercepts_, strict=True)))
    unseen = np.concatenate([images[TRAINED_ON:]] * SHAKEN)
    unseen += rng.normal(0, NOISE / 16, unseen.shape).astype(np.float32)
    np.savez(folder / "calibration.npz", image=unseen, labels=np.concatenate([labels[TRAINED_ON:]] * SHAKEN))
    return folder


def certify(folder: Path, *arguments: str, cloud: str = "large.onnx") -> "subprocess.CompletedProcess[str]":
    command = [*HEDGEROW, "certify", "--edge", "small.onnx", "--cloud", cloud, "--data", "calibration.npz", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, check=False)


def certified(folder: Path, *arguments: str, cloud: str = "large.onnx") -> Guarantee:
    done = certify(folder, "--json", *arguments, cloud=cloud)
    assert done.returncode == 0, done.stderr
    return msgspec.json.decode(done.stdout, type=Guarantee)


def test_two_files_give_a_gate_that_a_device_can_take(folder: Path, tmp_path: Path) -> None:
    out, curve = tmp_path / "guarantee.json", tmp_path / "curve.svg"
    done = certify(
        folder, "--epsilon", "0.03", "--delta", "0.1", "--precision", "fp32", "--out", str(out), "--plot", str(curve)
    )
    assert done.returncode == 0, done.stderr
    guarantee = msgspec.json.decode(out.read_bytes(), type=Guarantee)
    assert covers(guarantee, guarantee.gate)
    assert guarantee.epsilon == 0.03
    assert (guarantee.engine, guarantee.precision, guarantee.bound) == ("onnxruntime", "fp32", "binomial")
    assert 0 < guarantee.escalated < 1
    assert str(guarantee) in done.stdout
    assert f"{guarantee.escalated:.1%} of the requests go there" in done.stdout
    assert "<svg" in curve.read_text()


@pytest.fixture(scope="module")
def large(folder: Path) -> Iterator[str]:
    """Where the large model is served."""

    class Serving:
        async def __aenter__(self) -> Server:
            self.host = ModelHost(HostSettings())
            await self.host.load_file(ModelFile("large", "1", folder / "large.onnx"))
            self.server = Server(self.host, ServerSettings(port=0))
            return await self.server.__aenter__()

        async def __aexit__(self, *_: object) -> None:
            await self.server.stop()
            await self.host.close()

    with in_background(Serving) as server:
        yield f"grpc://{server.address}/large"


def test_a_large_model_behind_a_server_gives_the_same_guarantee_as_its_file(folder: Path, large: str) -> None:
    options = ("--epsilon", "0.05", "--delta", "0.1")
    assert certified(folder, *options, cloud=large) == certified(folder, *options)


@pytest.mark.parametrize("risk", ["accuracy", "selective", "selective-accuracy"])
def test_other_risks_have_gates_of_their_own(folder: Path, risk: str) -> None:
    guarantee = certified(folder, "--risk", risk, "--epsilon", "0.1", "--delta", "0.1", "--score", "margin")
    assert guarantee.gate.score == "margin"
    assert bool(guarantee.tested) == risk.startswith("selective")
    assert guarantee.risk != "disagreement with the teacher"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--epsilon", "0.0001"), "cannot certify ε = 0.0001 at δ = 0.05: it takes at least 29956"),
        (("--risk", "vibes"), "there are disagreement, accuracy, selective, selective-accuracy"),
        (("--plot", "curve.bmp"), "a picture ends in .png or .svg"),
        (("--output", "probs"), "no output 'probs'; it has: logits"),
        (("--score", "vibes"), "there is no score 'vibes'"),
        (("--data", "small.onnx"), "cannot be read as an archive of arrays"),
        (("--cloud", "grpc://127.0.0.1:1"), "expected grpc://HOST:PORT/MODEL"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(folder: Path, arguments: tuple[str, ...], said: str) -> None:
    done = certify(folder, *arguments)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_inputs_that_the_models_do_not_take_are_named(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", picture=np.zeros((5, 64), np.float32))
    done = certify(folder, "--data", str(tmp_path / "other.npz"))
    assert done.returncode == 1
    assert "takes image; the calibration set has picture" in done.stderr


def test_the_table_moves_epsilon_without_another_calibration(folder: Path) -> None:
    guarantee = certified(folder, "--epsilon", "0.05", "--delta", "0.1")
    assert json.loads(json.dumps(guarantee.thresholds)).keys() >= {"0.03", "0.05", "0.1"}
    again = certified(folder, "--epsilon", "0.1", "--delta", "0.1")
    assert again.gate.threshold == guarantee.thresholds["0.1"]
