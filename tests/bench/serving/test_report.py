"""What is wrong in a measurement must be seen in it."""

import json
from typing import Any

import numpy as np
import pytest
from bench.serving.goals import goals
from bench.serving.load import LoadFailure, Result, h2load_result
from bench.serving.report import markdown

H2LOAD = """finished in 2.00s, 500.00 req/s, 160.94KB/s
requests: {done} total, {done} started, {done} done, {done} succeeded, 0 failed, 0 errored, 0 timeout
traffic: 321.89KB (329615) total, 15.72KB (16098) headers (space savings 96.23%), 51.43KB ({data}) data
"""
ANSWER_BYTES = 60
TOOK_US = np.array([1000, 2000, 3000])


def result(done: int, data: int) -> Result:
    printed = H2LOAD.format(done=done, data=data)
    return h2load_result(printed, TOOK_US, answer_bytes=ANSWER_BYTES, inflight=8, seconds=2.0)


def test_answers_read_in_part_at_the_end_are_not_missing() -> None:
    found = result(1000, 1000 * ANSWER_BYTES + 7 * 30)
    assert (found.missing, found.rate, found.p50_ms) == (0, 500.0, 2.0)


def test_calls_that_failed_with_http_200_are_missing_from_the_rate() -> None:
    found = result(1000, 600 * ANSWER_BYTES)
    assert (found.missing, found.rate) == (400, 300.0)


def test_no_answers_are_a_failure_and_no_figure() -> None:
    with pytest.raises(LoadFailure, match="no request was answered"):
        result(0, 0)


def results(**changed: Any) -> dict[str, Any]:
    run = {"model": "tiny", "round": 1, "rate": 1.0, "p50_ms": 1.0, "p99_ms": 1.0, "rss_mb": 1.0, "cpu_us": 100.0}
    run |= {"requests": 10, "missing": 0, "wrong": 0, "inflight": 1, "server": "router"}
    return {
        "command": "scripts/bench serving",
        "started": "now",
        "rounds": 3,
        "seconds": 5.0,
        "machine": dict.fromkeys(
            ("cores", "cpu", "memory_gb", "kernel", "python", "load_before", "load_after"), "of old"
        ),
        "models": ["tiny"],
        "titles": {"router": "the router", "passthrough": "the proxy"},
        "runs": [run, {**run, "rate": 3.0}, {**run, "rate": 2.0, "wrong": 4}, {**run, "server": "passthrough"}],
        "failures": [],
        "versions": {},
        **changed,
    }


def test_a_table_tells_medians_their_spread_and_faults() -> None:
    table = markdown(json.loads(json.dumps(results())))
    assert "| the router | 1 | 2 (1 to 3) |" in table
    assert "| **4** of 30 |" in table
    assert "a ratio of 1.00" in table


def test_a_server_that_failed_is_in_the_report_with_its_last_words() -> None:
    failure = {"server": "kserve", "model": "tiny", "round": 2, "error": "it ended", "log": ["Segmentation fault"]}
    report = markdown(results(failures=[failure]))
    assert "kserve, tiny, round 2: it ended" in report
    assert "Segmentation fault" in report


def measured(server: str, *, model: str = "tiny", inflight: int | None = 32, **figures: float) -> dict[str, Any]:
    return {"model": model, "server": server, "inflight": inflight, "p50_ms": 1.0, "cpu_us": 1.0, **figures}


def test_a_goal_is_told_of_what_was_measured_and_of_nothing_else() -> None:
    runs = [measured("bare", rate=rate) for rate in (900.0, 1000.0, 5000.0)]
    assert goals(runs) == []
    (goal,) = goals([*runs, measured("kserve", rate=200.0)])
    assert (goal.ratio, goal.reached) == (5.0, True), "the medians decide"
    (goal,) = goals([*runs, measured("kserve", rate=251.0)])
    assert not goal.reached


def test_ours_is_held_against_the_best_peer_and_against_the_engine_at_its_best() -> None:
    model = "efficientnet-lite0"
    runs = [measured("bare", model=model, inflight=8, rate=95.0)]
    runs += [measured(peer, model=model, inflight=8, rate=rate) for peer, rate in (("kserve", 40.0), ("triton", 90.0))]
    runs += [measured("raw", model=model, inflight=inflight, rate=rate) for inflight, rate in ((1, 60.0), (2, 100.0))]
    assert [(round(goal.ratio, 2), goal.reached) for goal in goals(runs)] == [(0.95, True), (1.06, False)]
