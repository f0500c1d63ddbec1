"""The story that a newcomer is told holds with another seed than the usual one, in a log as on a terminal."""

import subprocess
import sysconfig
from pathlib import Path

import pytest

from hedgerow.config import environment

SEED = 6
TIMEOUT_S = 600


@pytest.mark.cloud
@pytest.mark.timeout(TIMEOUT_S)
def test_every_claim_of_the_story_holds_with_another_seed(tmp_path: Path) -> None:
    command = [str(Path(sysconfig.get_path("scripts"), "hedgerow")), "demo", "--seed", str(SEED)]
    variables = environment(NO_COLOR="1", XDG_STATE_HOME=str(tmp_path / "state"), TMPDIR=str(tmp_path))
    told = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)

    lines = told.stdout.splitlines()
    assert told.returncode == 0, told.stdout + told.stderr
    assert [line[0] for line in lines if line[:1].isdigit()] == list("123456")
    assert not [line for line in lines if line.startswith("  NOT")]
    assert len([line for line in lines if line.startswith("  ok ")]) >= 15
    assert "\x1b" not in told.stdout + told.stderr
    assert not list(tmp_path.glob("hedgerow-demo-*")), "a temporary home stayed behind"
