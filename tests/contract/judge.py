"""`scripts/oip-conformance`: holds the server at an address to `contract.conformance`, and shows the verdicts.

Exit code 0: no MUST is broken, but for the listed faults of this server; 1: one is; 2: there is nothing to judge.
"""

import argparse
import json
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from contract.rules import LEVEL
from contract.target import WAIT_S, Target, channel, from_metadata

from hedgerow.proto import oip_pb2, oip_pb2_grpc

RULES = Path(__file__).with_name("conformance.py")
OPTIONS = (
    str(RULES),
    "-q",
    "-o", "python_classes=OipConformance",
    "-o", "addopts=--import-mode=importlib",
    "-p", "no:cacheprovider",
    "--tb=line",
    "-W", "ignore::pytest.PytestAssertRewriteWarning",  # what is imported above explains itself
)  # fmt: skip
MAX_REASON_CHARS = 300
PASS, FAIL, KNOWN, GONE, NOT_APPLICABLE = "pass", "FAIL", "known fault", "listed, but gone", "n/a"


@dataclass(frozen=True)
class Verdict:
    """What was found of one rule."""

    level: str
    rule: str
    outcome: str
    reason: str = ""


class Report:
    """A pytest plugin that gives the rules their target and keeps the verdicts."""

    def __init__(self, target: Target, faults: Mapping[str, str]) -> None:
        self._target = target
        self._faults = faults
        self._levels: dict[str, str] = {}
        self.verdicts: list[Verdict] = []

    @pytest.fixture
    def target(self) -> Target:
        return self._target

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            assert isinstance(item, pytest.Function)
            self._levels[item.nodeid] = getattr(item.function, LEVEL)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            rule = title(report.nodeid)
            known = self._faults.get(rule, "")
            match report.outcome:
                case "passed":
                    outcome, reason = (GONE, known) if known else (PASS, "")
                case "failed":
                    outcome, reason = (KNOWN, known) if known else (FAIL, crash(report))
                case _:
                    outcome, reason = NOT_APPLICABLE, crash(report)
            self.verdicts.append(Verdict(self._levels[report.nodeid], rule, outcome, reason))


def title(nodeid: str) -> str:
    """A rule's name in plain words: "bad input is refused and harms nobody: wrong rank"."""
    words = nodeid.rpartition("::test_")[2].rstrip("]")
    return words.replace("[", ": ").replace("_", " ")


def crash(report: pytest.TestReport) -> str:
    """Why a rule failed or does not apply, in a line."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    text = " ".join(getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr)).split())
    if text.startswith("AssertionError: "):  # what the rule says itself, without the expression
        text = text.removeprefix("AssertionError: ").partition(" assert ")[0]
    # An error of gRPC: its status and details.
    text = text.rpartition("RPC that terminated with: ")[2].partition(" debug_error_string")[0]
    return text[:MAX_REASON_CHARS]


def only_model(stub: Any) -> str:
    """The first ready model of the server's index; exits if it has none."""
    try:
        index = stub.RepositoryIndex(oip_pb2.RepositoryIndexRequest(ready=True), timeout=WAIT_S)
    except grpc.RpcError:
        index = oip_pb2.RepositoryIndexResponse()
    for model in index.models:
        return str(model.name)
    sys.exit("the server does not say which models it has: name one with --model")


def listed(file: Path | None, server: oip_pb2.ServerMetadataResponse) -> Mapping[str, str]:
    """The known faults of `server` in its version, by rule."""
    faults: dict[str, dict[str, str]] = tomllib.loads(file.read_text(encoding="utf-8")) if file else {}
    return faults.get(f"{server.name} {server.version}", {})


def judge(target: Target, faults: Mapping[str, str]) -> list[Verdict]:
    """Every rule's verdict."""
    report = Report(target, faults)
    with redirect_stdout(StringIO()) as said:
        code = pytest.main([*OPTIONS], plugins=[report])
    if code not in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED} or not report.verdicts:
        sys.exit(said.getvalue())
    return report.verdicts


def table(verdicts: list[Verdict]) -> str:
    """The verdicts for people: a line a rule, the reason below it, and the sum."""
    lines = []
    for verdict in verdicts:
        lines.append(f"{verdict.level:6}  {verdict.outcome:16}  {verdict.rule}")
        if verdict.reason:
            lines.append(f"{'':26}{verdict.reason}")
    counts = Counter(verdict.outcome for verdict in verdicts)
    return "\n".join([*lines, ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())])


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="oip-conformance", description="Hold a server to the Open Inference Protocol v2 over gRPC."
    )
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--model", default="", help="by default the first that the server says it has")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=FILE.npy",
        help="by default made from the model's metadata",
    )
    parser.add_argument("--peer-faults", type=Path, metavar="FILE", help='TOML: ["name version"], rule = what is wrong')
    parser.add_argument("--json", action="store_true", help="the verdicts as JSON")
    arguments = parser.parse_args()
    given = {}
    for one in arguments.input:
        name, _, file = one.partition("=")
        given[name] = np.load(file)
    with channel(arguments.address) as to:
        stub: Any = oip_pb2_grpc.GRPCInferenceServiceStub(to)
        try:
            server = stub.ServerMetadata(oip_pb2.ServerMetadataRequest(), timeout=WAIT_S, wait_for_ready=True)
            target = from_metadata(arguments.address, arguments.model or only_model(stub), given)
        except grpc.RpcError as error:
            sys.stderr.write(f"{arguments.address} cannot be judged: {error}\n")
            return 2
    verdicts = judge(target, listed(arguments.peer_faults, server))
    if arguments.json:
        shown = json.dumps([asdict(verdict) for verdict in verdicts], indent=2)
    else:
        shown = f"{server.name} {server.version} at {arguments.address}, model {target.model}\n{table(verdicts)}"
    sys.stdout.write(shown + "\n")
    return any(verdict.outcome == FAIL and verdict.level == "MUST" for verdict in verdicts)


if __name__ == "__main__":
    sys.exit(main())
