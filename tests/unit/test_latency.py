"""How long answers took lately: what is remembered, what is guessed, and what is forgotten."""

import random

from hedgerow.latency import LatencyWindow, PeakLatency


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


def test_an_endpoint_slower_than_every_callers_patience_is_learnt_as_slow_and_tried_again_later() -> None:
    window = LatencyWindow()
    window.add_bound(0.3, now=0)
    assert window.quantile(0.95, now=0) is None, "one may be a slow start"
    window.add_bound(0.28, now=1)
    expected = window.quantile(0.95, now=1)
    assert expected is not None
    assert expected > 0.3, "whoever has 0.3 s must not be let in again"
    for at in range(2, 10):
        window.add_bound(0.3, now=at)
    assert window.quantile(0.95, now=10) == expected, "the guess does not grow by itself"
    assert window.quantile(0.95, now=31) is None


def test_timeouts_of_the_impatient_do_not_make_a_slow_endpoint_look_fast() -> None:
    window = LatencyWindow()
    for at in range(40):
        window.add(1.0 + at / 1000, now=at / 100)
    before = window.quantile(0.5, now=1)
    for _ in range(40):
        window.add_bound(0.1, now=1)
    after = window.quantile(0.5, now=1)
    assert before is not None
    assert after is not None
    assert after >= before


def test_a_few_timeouts_among_many_answers_are_no_tail() -> None:
    window = LatencyWindow()
    for _ in range(100):
        window.add(0.1, now=0)
    window.add_bound(0.2, now=0)
    window.add_bound(0.2, now=0)
    assert window.quantile(0.95, now=0) == 0.1
    assert window.quantile(0.99, now=0) == 0.4


def test_the_window_holds_no_more_than_it_should_whatever_comes_in() -> None:
    window = LatencyWindow(samples=10)
    for at in range(100):
        (window.add if at % 3 else window.add_bound)(0.1, now=at)
    assert len(window._sorted) <= 10
    window.clear()
    assert window.quantile(0.5, now=100) is None


def test_bad_news_of_an_endpoint_counts_at_once_and_is_forgotten_slowly() -> None:
    peak = PeakLatency()
    assert not peak.known
    for at in range(10):
        peak.add(0.1, now=at)
    peak.add(2.0, now=10)
    assert peak.value(10) == 2.0
    peak.add(0.1, now=11)
    assert 1.5 < peak.value(11) < 2.0
    assert peak.value(100) < 0.1, "so that it is tried again"
