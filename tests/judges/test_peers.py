"""The conformance rules, calibrated on foreign servers: what they are known to get wrong is found, and nothing else."""

import asyncio
import json
from pathlib import Path

import pytest
from contract.judge import FAIL, GONE
from judges import foreign

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("peer", [foreign.mlserver, foreign.kserve], ids=lambda peer: peer.__name__)
async def test_the_rules_find_the_listed_faults_and_no_others(peer: object, tmp_path: Path) -> None:
    assert callable(peer)
    async with peer(tmp_path) as address:
        judge = await asyncio.create_subprocess_exec(
            ROOT / "scripts" / "oip-conformance", address, "--model=mixed", "--json",
            f"--peer-faults={ROOT / 'tests' / 'contract' / 'peer_faults.toml'}",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        said, _ = await judge.communicate()
    verdicts = json.loads(said)
    assert verdicts
    assert not [verdict for verdict in verdicts if verdict["outcome"] in {FAIL, GONE}]
    assert judge.returncode == 0
