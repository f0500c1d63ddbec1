"""What must not multiply an outage or outlive it: the circuit breaker, the retry budget, the latency window."""

import random

from hedgerow.breaker import Breaker, RetryBudget
from hedgerow.latency import LatencyWindow


def test_failures_in_a_row_open_the_breaker_and_scattered_ones_do_not() -> None:
    breaker = Breaker(failures_to_open=3)
    for _ in range(10):
        assert not breaker.failed("x")
        assert not breaker.failed("x")
        breaker.succeeded()
    assert [breaker.failed(why) for why in "abcd"] == [False, False, True, False], "opening is told once"
    assert breaker.open
    assert breaker.reason == "d"


def test_a_breaker_just_closed_is_on_trial_until_the_first_success() -> None:
    breaker = Breaker(failures_to_open=3)
    assert breaker.trip("refused")
    assert not breaker.trip("refused")
    assert breaker.close()
    assert not breaker.close()
    assert breaker.failed("again"), "the first failure opens it again"
    breaker.close()
    breaker.succeeded()
    assert not breaker.failed("x")
    assert not breaker.open


def test_retries_are_a_share_of_the_requests_however_many_fail() -> None:
    budget = RetryBudget(share=0.2, burst=3)
    retries = 0
    for _ in range(1000):
        budget.requested()
        retries += budget.spend()
    assert 195 <= retries <= 203
    assert not RetryBudget(share=0.2, burst=0).spend()


def test_quantiles_are_those_of_the_last_answers() -> None:
    window, draw = LatencyWindow(samples=100), random.Random(1)
    assert window.quantile(0.5) is None
    taken = [draw.choice([0.1, 0.2, draw.random()]) for _ in range(1000)]
    for at, seconds in enumerate(taken):
        window.add(seconds, now=at / 1000)
        recent = sorted(taken[max(0, at - 99) : at + 1])
        half, most = window.quantile(0.5, now=at / 1000), window.quantile(0.95, now=at / 1000)
        assert half == (recent[-(-len(recent) // 2) - 1] if at >= 1 else None)
        assert most == (recent[-(-len(recent) * 95 // 100) - 1] if at >= 19 else None), "a few say nothing of a tail"


def test_what_was_slow_once_is_forgotten_so_that_it_is_tried_again() -> None:
    window = LatencyWindow(max_age_s=60)
    for _ in range(20):
        window.add(9.0, now=0)
    for _ in range(20):
        window.add(0.1, now=30)
    assert window.quantile(0.95, now=60) == 9.0
    assert window.quantile(0.95, now=61) == 0.1
    assert window.quantile(0.95, now=91) is None
