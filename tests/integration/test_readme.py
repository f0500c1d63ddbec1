"""What the README tells a newcomer to do with two ONNX files, done as it stands there."""

import json
import re
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from simulators import models

from hedgerow.backend import Deadline
from hedgerow.client import Client
from hedgerow.config import environment, load
from hedgerow_cloud.local.broker import free_port
from hedgerow_cloud.serving.settings import ServeSettings
from hedgerow_edge.settings import AgentSettings

README = Path(__file__).parents[2] / "README.md"
CLOUD, EDGE = "127.0.0.1:8003", "127.0.0.1:8001"
"""The addresses in the README, which here give way to free ones."""
START_S = 150
"""Ray takes its time on a busy machine."""
STOP_S = 30


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture
def addresses() -> dict[str, str]:
    return {CLOUD: f"127.0.0.1:{free_port()}", EDGE: f"127.0.0.1:{free_port()}"}


@pytest.fixture
def folder(tmp_path: Path, addresses: dict[str, str]) -> Path:
    for block in blocks("toml"):
        name = block.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(block.replace(CLOUD, addresses[CLOUD]))
    return tmp_path


def command(line: str) -> list[str]:
    program, *arguments = line.split()
    return [str(Path(sysconfig.get_path("scripts"), program)), *arguments]


@contextmanager
def running(line: str, folder: Path, address: str) -> Iterator[None]:
    """The daemon that `line` starts, ready at `address`."""
    port = address.rpartition(":")[2]
    variables = environment(HEDGEROW_SERVER__PORT=port, XDG_STATE_HOME=str(folder / "state"))
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command(line), cwd=folder, env=variables, stdout=log, stderr=log)
    try:
        with Client(address) as client:
            deadline = Deadline.after(START_S)
            while not client.ready("digits", timeout_s=1):
                assert process.poll() is None, (folder / "log").read_text()
                deadline.check(f"{line} was ready")
        yield
    finally:
        process.terminate()
        assert process.wait(STOP_S) == 0


@pytest.mark.cloud
@pytest.mark.timeout(400)
def test_two_onnx_files_and_two_settings_files_are_enough(
    folder: Path, addresses: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models.classifier(folder / "small.onnx", sure=10.0)
    models.classifier(folder / "large.onnx", sure=10.0, shift=1)  # tells who answered: always the class after
    sure, unsure = np.zeros((2, 1, models.FEATURES), np.float32)
    sure[0, 3] = 1.0
    unsure[0, [3, 4]] = 1.0, 0.9
    two_files = next(block for block in blocks("console") if block.startswith("$ hedgerow-cloud serve"))
    serve, edge, infer = (line.removeprefix("$ ") for line in two_files.splitlines())
    (python,) = blocks("python")
    monkeypatch.chdir(folder)

    with running(serve, folder, addresses[CLOUD]), running(edge, folder, addresses[EDGE]):
        for picture, answer, tier in ((sure, 3, "edge"), (unsure, 4, "cloud")):
            np.save(folder / "picture.npy", picture)
            told = subprocess.run(
                [*command(infer), "--json", "--server", addresses[EDGE]], cwd=folder, capture_output=True, check=True
            )
            facts = json.loads(told.stdout)
            assert (facts["answer"], facts["tier"]) == (answer, tier)
            assert facts["reason"].startswith("confidence")

            exec(compile(python.replace(EDGE, addresses[EDGE]), "README.md", "exec"), {})
            assert capsys.readouterr().out.startswith(f"{answer} {tier} ")


def test_the_settings_shown_are_settings(folder: Path) -> None:
    shown = load(AgentSettings, folder / "more.toml", {})
    assert shown.host.batching.max_batch_size == 32
    assert shown.host.isolation["digits"].run_timeout_s == 5
    assert [target.weight for target in shown.splits["shown"].targets.values()] == [9, 1]
    assert shown.tenants is not None
    assert shown.tenants.others.requests_per_s == 50
    assert shown.shared_memory is not None
    assert load(ServeSettings, folder / "large.toml", {}).fronts in {1, 4}
