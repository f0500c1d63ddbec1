"""The command line as people and scripts meet it: processes, exit codes, what goes to which stream."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from simulators import models

from hedgerow import release
from hedgerow.config import environment
from hedgerow.release import Manifest, Variant
from hedgerow_cloud.local.stack import Stack

HEDGEROW = [sys.executable, "-m", "hedgerow_cloud.cli.main"]
UP_TIMEOUT_S = 60.0


class Shell:
    """Runs `hedgerow` with a state folder of its own."""

    def __init__(self, state: Path) -> None:
        self.environment = environment(XDG_STATE_HOME=str(state), NO_COLOR="1")
        self.home = state / "hedgerow"

    def run(self, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        command = [*HEDGEROW, *map(str, arguments)]
        return subprocess.run(
            command, env=self.environment | variables, capture_output=True, text=True, timeout=60, check=False
        )

    def json(self, *arguments: object) -> Any:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def up(self) -> subprocess.Popen[str]:
        """`hedgerow up`, once it says that everything is."""
        up = subprocess.Popen([*HEDGEROW, "up"], env=self.environment, stderr=subprocess.PIPE, text=True)
        assert up.stderr is not None
        for line in up.stderr:
            if "everything is up" in line:
                return up
        raise AssertionError(f"`hedgerow up` ended with {up.wait()}")


def end(up: subprocess.Popen[str], number: signal.Signals) -> int:
    up.send_signal(number)
    _, _ = up.communicate(timeout=60)
    return up.returncode


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Broker, fleet and device, as `hedgerow up` runs them."""
    shell = Shell(tmp_path_factory.mktemp("state"))
    stack = Stack.provision(shell.home)
    with (shell.home / "stack.toml").open("a") as settings:
        settings.write("\n[edge.updates]\nprobation_s = 0.2\n")
    up = shell.up()
    yield shell
    assert end(up, signal.SIGINT) == 0
    assert stack.running() == []


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Nothing runs."""
    return Shell(tmp_path_factory.mktemp("state"))


def make_release(folder: Path, counter: int) -> Path:
    folder.mkdir()
    models.classifier(folder / "student.onnx", sure=9.0)
    file = release.describe(folder, "student.onnx")
    variant = Variant(name="fp32", engine="onnxruntime", precision="fp32", file=file.path)
    manifest = Manifest(
        format=1,
        model="digits",
        counter=counter,
        created="",
        variants=(variant,),
        files=(file,),
        labels=tuple("0123456789"),
    )
    (folder / release.MANIFEST).write_bytes(manifest.encode())
    return folder


def test_a_release_is_published_assigned_listed_and_asked_without_any_option(shell: Shell, tmp_path: Path) -> None:
    published = shell.run("publish", make_release(tmp_path / "r1", 1))
    assert published.returncode == 0, published.stderr
    assert "hedgerow assign digits 1" in published.stderr
    assigned = shell.json("assign", "digits", 1, "--wait", "--timeout-s", 30)
    assert assigned == {"model": "digits", "counter": 1, "devices": ["here"]}

    (device,) = shell.json("devices")
    assert device["online"] is True
    assert device["models"][0]["running"] == 1
    assert device["assigned"] == [{"model": "digits", "counter": 1}]
    (listed,) = shell.json("releases")
    assert (listed["model"], listed["counter"], listed["running"]) == ("digits", 1, 1)
    assert "digits/1" in shell.run("releases", "digits").stdout
    assert "here" in shell.run("devices").stdout

    array = np.zeros(64)
    array[7] = 1
    np.save(tmp_path / "seven.npy", array)
    answer = shell.json("infer", "digits", tmp_path / "seven.npy")
    assert (str(answer["answer"]), answer["tier"], answer["release"]) == ("7", "edge", "digits/1")
    assert answer["reason"]

    pixels = np.full((80, 80), 255, np.uint8)
    pixels[0:10, 30:40] = 0  # dark on light: the fourth of 8x8 fields in the first row
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "three.png")
    asked = shell.run("infer", "digits", tmp_path / "three.png", "--invert")
    assert re.search(r"^answer +3$", asked.stdout, re.MULTILINE), asked
    assert "80x80 RGB resized to 8x8 greyscale" in asked.stderr


def test_errors_while_everything_runs_are_one_line_that_names_the_fault(shell: Shell, tmp_path: Path) -> None:
    np.save(tmp_path / "small.npy", np.zeros((1, 3), np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "fake.png").write_bytes(b"no picture")
    (tmp_path / "text.txt").write_text("hello")
    tampered = make_release(tmp_path / "tampered", 5)
    (tampered / "student.onnx").write_bytes(b"something else")
    for arguments, said in (
        (("infer", "unknown", tmp_path / "small.npy"), "unknown"),
        (("infer", "digits", tmp_path / "small.npy"), "pixels"),
        (("infer", "digits", tmp_path / "objects.npy"), "plain numbers"),
        (("infer", "digits", tmp_path / "fake.png"), "no picture"),
        (("infer", "digits", tmp_path / "text.txt"), "neither .npy nor .png"),
        (("infer", "digits", tmp_path / "absent.npy"), "there is no file"),
        (("assign", "digits", 77), "there is no release digits/77"),
        (("assign", "digits", 1, "ghost"), "no device called 'ghost'"),
        (("publish", tmp_path), "manifest.json is missing"),
        (("publish", tampered), "student.onnx has sha256"),
        (("publish", make_release(tmp_path / "r6", 6), "--keys", tmp_path), "release.root.json"),
    ):
        expect_error(shell.run(*arguments), 1, said)


def test_a_release_that_a_device_refuses_is_said_at_once_and_stays_in_the_list(shell: Shell, tmp_path: Path) -> None:
    for counter in (2, 3):
        assert shell.run("publish", make_release(tmp_path / f"r{counter}", counter)).returncode == 0
    assert shell.run("assign", "digits", 3, "--wait", "--timeout-s", 30).returncode == 0
    started = time.monotonic()
    why = "the director assigns digits/2, this device has already confirmed digits/3: rolled back"
    expect_error(shell.run("assign", "digits", 2, "--wait"), 1, f"here does not run digits/2: {why}")
    assert time.monotonic() - started < 30
    assert f"here: no updates: {why}" in shell.run("devices").stdout


def test_a_second_up_leaves_the_first_alone(shell: Shell) -> None:
    again = shell.run("up")
    assert again.returncode == 1
    assert "run already; `hedgerow down` stops them" in again.stderr
    assert shell.run("devices").returncode == 0


def test_errors_while_nothing_runs_say_what_to_do(cold: Shell, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, 64), np.float32))
    for arguments, code, said in (
        (("devices",), 1, "127.0.0.1:8002 does not answer; `hedgerow up`"),
        (("devices", "--fleet", "127.0.0.1:1"), 1, "127.0.0.1:1 does not answer"),
        (("releases", "--fleet", "nowhere"), 1, "--fleet takes HOST:PORT"),
        (("infer", "digits", tmp_path / "a.npy", "--server", "127.0.0.1:1"), 1, "127.0.0.1:1 does not answer"),
        (("down",), 1, "`hedgerow up` does it"),
        (("assign", "digits", "one"), 2, "counter"),
        (("nonsense",), 2, "nonsense"),
        (("devices", "--nonsense"), 2, "--nonsense"),
    ):
        expect_error(cold.run(*arguments), code, said)
    expect_error(cold.run("devices", HEDGEROW_FLEET="127.0.0.1:2"), 1, "127.0.0.1:2 does not answer")


def expect_error(done: subprocess.CompletedProcess[str], code: int, said: str) -> None:
    assert done.returncode == code, done
    assert said in done.stderr
    assert done.stderr.startswith("hedgerow: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""


def test_the_doctor_says_what_is_here_and_what_is_not(cold: Shell) -> None:
    checks = {check["name"]: check for check in cold.json("doctor")}
    assert checks["python"]["ok"]
    assert "grpcio" in checks["core"]["detail"]
    assert "onnxruntime" in checks["engines"]["detail"]
    assert checks["profile"]["ok"]
    assert not checks["fleet service"]["ok"]
    assert "hedgerow up" in checks["fleet service"]["fix"]


def test_without_a_terminal_nothing_is_coloured(cold: Shell) -> None:
    for arguments in ((), ("--help",), ("doctor",)):
        done = cold.run(*arguments, FORCE_COLOR="")
        assert done.returncode == 0
        assert "\x1b" not in done.stdout + done.stderr
        assert done.stdout.strip()


LIGHT = """
import sys
for name in "ray torch sqlalchemy tuf securesystemslib paho onnxruntime onnx scipy sklearn".split():
    sys.modules[name] = None
from hedgerow_cloud.cli.main import main
main()
"""


def test_help_and_inference_need_only_core_and_cli(shell: Shell, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, 3), np.float32))
    for arguments, said in ((["--help"], "Usage"), (["infer", "digits", str(tmp_path / "a.npy")], "")):
        done = subprocess.run(
            [sys.executable, "-c", LIGHT, *arguments],
            env=shell.environment,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert "not installed" not in done.stderr, done.stderr
        assert "unexpected" not in done.stderr, done.stderr
        assert said in done.stdout


def test_when_a_daemon_ends_up_says_which_and_stops_the_others(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    up = shell.up()
    stack = Stack(shell.home)
    assert stack.running() == ["broker", "fleet", "edge"]
    stack.kill("fleet")
    _, said = up.communicate(timeout=60)
    assert up.returncode == 1
    assert "fleet ended" in said
    assert str(stack.log("fleet")) in said
    assert stack.running() == []


def test_a_daemon_that_cannot_start_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    stack = Stack.provision(shell.home)
    (shell.home / "fleet" / "fleet.db").write_text("no database " * 100)
    done = shell.run("up")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "fleet ended while it started" in last
    assert "fleet.db" in last
    assert stack.running() == []


def test_down_ends_what_another_process_left_running(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    with Stack.provision(shell.home) as stack:
        stack.start("broker", "fleet")
        again = Stack(shell.home)
        assert again.running() == ["broker", "fleet"]
        done = shell.run("down")
        assert done.returncode == 0
        assert "broker, fleet" in done.stderr
        assert stack.running() == []
