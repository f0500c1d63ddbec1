"""What must not multiply an outage or outlive it: the circuit breaker, the retry budget."""

from hedgerow.remote.breaker import Breaker, RetryBudget


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
