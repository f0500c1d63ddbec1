"""A soak that leaks, slows down or fails must not pass for one that held."""

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench.soak.__main__ import main
from bench.soak.report import MEMORY, markdown
from bench.soak.tally import EXAMPLES, Tally
from bench.soak.upsets import Upsets
from bench.soak.verdict import MAX_SLOPE_MB_H, TIMED, findings, theil_sen

MINUTES = 40


def minutes(**changes: Any) -> list[dict[str, Any]]:
    """A quiet soak. `changes` are functions of the minute's number that say what a figure is instead."""
    random_ = random.Random(1)

    def figure(name: str, number: int, usual: float) -> float:
        return float(changes[name](number)) if name in changes else usual

    return [
        {
            "at_s": 60.0 * number,
            "agent": {
                **{memory: figure("rss_mb", number, 150) + random_.uniform(-0.05, 0.05) for memory in MEMORY},
                "descriptors": figure("descriptors", number, 20) + random_.choice((0, 1, 3)),
                "threads": figure("threads", number, 9),
                "cpu_percent": 10.0,
                "log_kb": 1.0,
            },
            "mood_p99_ms": figure("mood", number, 0.5),
            "lag_p99_ms": 0.5,
            "kinds": {
                kind: {"outcomes": {"OK": 100}, "p50_ms": 1.0, "p99_ms": figure("p99", number, 3)} for kind in TIMED
            },
            "tiers": {"edge": 300},
            "events": [],
            "failures": int(figure("failures", number, 0)),
            "unsent": int(figure("unsent", number, 0)),
        }
        for number in range(1, MINUTES + 1)
    ]


def outcomes(soak: list[dict[str, Any]]) -> set[str]:
    return {one.outcome for one in findings(soak)}


def outcome(soak: list[dict[str, Any]], word: str) -> str:
    (found,) = (one.outcome for one in findings(soak) if word in one.rule)
    return found


def test_a_quiet_soak_holds() -> None:
    assert outcomes(minutes()) == {"held"}


def test_a_leak_of_a_few_megabytes_an_hour_is_seen_through_the_noise() -> None:
    assert outcome(minutes(rss_mb=lambda number: 150 + 3 * number / 60), "memory") == "broken"


def test_memory_taken_while_warming_up_is_no_leak() -> None:
    assert outcome(minutes(rss_mb=lambda number: 150 - 50 / number**2), "memory") == "held"


def test_one_leap_of_memory_does_not_make_a_slope() -> None:
    assert outcome(minutes(rss_mb=lambda number: 150 + 20 * (number == 30)), "memory") == "held"


@pytest.mark.parametrize("name", ["descriptors", "threads"])
def test_what_is_opened_and_never_closed_is_seen(name: str) -> None:
    assert outcome(minutes(**{name: lambda number: 20 + number // 5}), name) == "broken"


def test_a_p99_that_grows_breaks_the_rule() -> None:
    assert outcome(minutes(p99=lambda number: 2.0 * (1 + (number > 20))), "`sure`") == "broken"


def test_minutes_in_which_the_machine_stood_still_tell_nothing_of_the_server() -> None:
    def stalls(number: int) -> float:
        return 1.0 + 100 * (number % 3 == 0)

    assert outcome(minutes(p99=stalls, mood=stalls), "`sure`") == "held"
    assert outcome(minutes(mood=lambda number: 1.0 + 100 * (number > 27)), "`sure`") == "not shown"


def test_one_failure_is_enough() -> None:
    assert outcome(minutes(failures=lambda number: number == 7), "fails") == "broken"


def test_a_failure_that_no_minute_counts_is_enough_too() -> None:
    assert "broken" in {one.outcome for one in findings(minutes(), failures_besides=1)}


def test_a_soak_without_a_minute_has_not_held() -> None:
    assert "held" not in outcomes([])


def test_many_failures_of_one_kind_do_not_keep_another_from_the_page() -> None:
    tally = Tally()
    for _ in range(100):
        tally.failed("sure", "UNAVAILABLE: gone")
    tally.failed("the agent", "it is gone")
    assert tally.failures == [*["sure: UNAVAILABLE: gone"] * EXAMPLES, "the agent: it is gone"]


def test_requests_that_could_not_be_sent_leave_the_soak_unproved() -> None:
    assert outcome(minutes(unsent=lambda number: number == 7), "fails") == "not shown"


def test_a_short_run_proves_nothing_but_its_failures() -> None:
    short = minutes(failures=lambda number: number == 1)[:5]
    assert [one.outcome for one in findings(short)] == ["broken", "not shown"]


def test_the_slope_is_that_of_the_line_and_its_interval_holds_it() -> None:
    random_ = random.Random(2)
    hours = [number / 60 for number in range(MINUTES)]
    slope = theil_sen(hours, [100 + 5 * hour + random_.gauss(0, 0.1) for hour in hours])
    assert slope.low < 5 < slope.high
    assert slope.low > MAX_SLOPE_MB_H
    assert slope.middle == pytest.approx(5, abs=0.5)


def results(soak: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    command = {"command": "scripts/bench soak", "started": "2026-01-01", "rate": 150, "machine": "a machine"}
    return {**command, "minutes": soak, "failures": ["sure: UNAVAILABLE: gone"], **more}


def test_the_page_says_what_broke_and_what_failed_first() -> None:
    page = markdown(results(minutes(failures=lambda number: number == 7)))
    assert "| **broken** | 1 failures" in page
    assert "- sure: UNAVAILABLE: gone" in page
    assert len([line for line in page.splitlines() if line.startswith("| 40 |")]) == 1


def test_the_page_counts_what_failed_after_the_last_minute() -> None:
    assert "| **broken** | 3 failures" in markdown(results(minutes(), failures_besides=3))


@pytest.fixture
def signals() -> Iterator[None]:
    """What is done at SIGTERM is the same after the test."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("signals")
def test_an_agent_that_dies_before_the_first_minute_is_over_fails_the_soak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def kill(upsets: Upsets) -> None:
        await upsets._stage.agent.kill()

    monkeypatch.setattr(Upsets, "run", kill)
    assert main(["--minutes", "1", "--rate", "5", "--cache", str(tmp_path)]) == 1
    saved = json.loads((tmp_path / "soak.json").read_text())
    assert not saved["minutes"]
    assert saved["failures_besides"] > 0
    page = (tmp_path / "soak.md").read_text()
    assert "- the agent: it is gone" in page
    assert "| held |" not in page


@pytest.mark.parametrize("minutes", ["0.4", "0", "-1"])
def test_less_than_a_minute_is_no_soak(minutes: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--minutes", minutes, "--cache", str(tmp_path)])
    assert caught.value.code == 2
