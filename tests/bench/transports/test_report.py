"""What is wrong with a transport must be seen in the report, and ratios must be of one round."""

from typing import Any

from bench.transports.kinds import KINDS, REFERENCE
from bench.transports.report import markdown
from bench.transports.server import PEERS

from hedgerow import transports


def run(kind: str, number: int, rate: float, **changed: Any) -> dict[str, Any]:
    figures = {"p50_ms": 1.0, "p99_ms": 2.0, "cpu_us": 100.0, "requests": 10, "missing": 0}
    return {"kind": kind, "round": number, "call": "live", "inflight": 8, "connections": 1, "rate": rate} | (
        figures | changed
    )


def report(*runs: dict[str, Any], **changed: Any) -> str:
    results: dict[str, Any] = {
        "command": "scripts/bench transports",
        "machine": "2 cores",
        "load_average": [1.0, 2.0],
        "packages": [],
        "rounds": 2,
        "seconds": 1.0,
        "runs": runs,
        "failures": [],
        "idle": {},
        "soundness": {},
    }
    return markdown(results | changed)


def test_ratios_compare_what_ran_in_the_same_round() -> None:
    text = report(run(REFERENCE, 1, 10), run("native", 1, 20), run(REFERENCE, 2, 100), run("native", 2, 400))
    assert "| native | 8 over 1 | 210 (20 to 400) | 3 (2 to 4) |" in text


def test_missing_answers_are_shown() -> None:
    assert "| **7** |" in report(run(REFERENCE, 1, 10, missing=3), run(REFERENCE, 2, 10, missing=4))


def test_a_server_that_failed_under_load_is_named() -> None:
    assert "- grpclib, 2: it hangs" in report(failures=[{"kind": "grpclib", "round": 2, "error": "it hangs"}])


def test_a_probe_that_one_server_fails_is_shown_with_all_servers() -> None:
    good, bad = {"ok": True, "remark": ""}, {"ok": False, "remark": "a|b"}
    text = report(soundness={"native": {"drain": good, "tls": good}, "grpclib": {"drain": bad, "tls": good}})
    assert "| drain | passes | **fails** |" in text
    assert "| tls |" not in text
    assert "- drain: a/b" in text


def test_every_kind_is_a_transport_that_is_there() -> None:
    peers = {file.stem for file in PEERS.glob("*.py")}
    assert {kind.transport for kind in KINDS.values()} == peers | set(transports.known())
