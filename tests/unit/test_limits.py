"""The limit of requests in flight: it must follow the latency, and never starve or flood a remote."""

from hypothesis import given
from hypothesis import strategies as st

from hedgerow.remote.limits import START, WINDOW, GradientLimit

latencies = st.floats(min_value=0, max_value=1e4, allow_nan=False)


def feed(limit: GradientLimit, seconds: float, windows: int, *, load: float = 1.0) -> None:
    for _ in range(windows * WINDOW):
        limit.answered(seconds, round(load * limit.limit))


@given(st.lists(st.tuples(latencies, st.integers(0, 2000)), max_size=300), st.integers(1, 50), st.integers(1, 200))
def test_it_stays_within_its_bounds_whatever_comes(answers: list[tuple[float, int]], least: int, most: int) -> None:
    limit = GradientLimit(least, most)
    for seconds, inflight in answers:
        limit.answered(seconds, inflight)
        assert min(least, most) <= limit.limit <= most


def test_it_shrinks_when_answers_get_slower_and_grows_again_afterwards() -> None:
    limit = GradientLimit(16, 1024)
    feed(limit, 0.1, 12)
    assert limit.limit > START
    before = limit.limit
    feed(limit, 1.0, 20)
    assert limit.limit < before / 2
    shrunk = limit.limit
    feed(limit, 0.1, 60)
    assert limit.limit > 2 * shrunk, "it must recover by itself"


def test_a_slow_answer_among_few_requests_does_not_throttle_them() -> None:
    limit = GradientLimit(16, 1024)
    feed(limit, 0.1, 5, load=0.1)
    feed(limit, 5.0, 20, load=0.1)
    assert limit.limit == START


def test_a_latency_that_only_wavers_does_not_shrink_it() -> None:
    limit = GradientLimit(16, 1024)
    for _ in range(20):
        before = limit.limit
        feed(limit, 0.1, 1)
        feed(limit, 0.13, 1)
        assert limit.limit >= before


def test_switched_off_it_is_the_bound_itself() -> None:
    limit = GradientLimit(16, 64, fixed=True)
    feed(limit, 0.1, 5)
    feed(limit, 9.0, 20)
    assert limit.limit == 64
