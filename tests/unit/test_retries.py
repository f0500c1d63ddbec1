"""The rules by which the Python client tries again."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hedgerow import errors
from hedgerow.client.retries import FIRST_PAUSE_S, MAX_PAUSE_S, RETRY_BURST, RETRY_SHARE, Retries

seconds = st.floats(0, 1000)


@given(st.none() | seconds, st.integers(1, 9), seconds)
def test_a_pause_keeps_within_the_deadline_and_to_what_the_server_asked(
    asked_s: float | None, attempt: int, remaining_s: float
) -> None:
    pause_s = Retries(10).pause_s(errors.Unavailable("", retry_after_s=asked_s), attempt, remaining_s)
    if pause_s is not None:
        assert (asked_s or 0) <= pause_s < remaining_s
        assert pause_s <= (asked_s or 0) + MAX_PAUSE_S
    elif asked_s is None:
        assert remaining_s <= MAX_PAUSE_S
    else:
        assert asked_s + MAX_PAUSE_S >= remaining_s


@given(st.integers(1, 5))
def test_there_are_only_so_many_attempts(attempts: int) -> None:
    retries = Retries(attempts)
    pauses = [retries.pause_s(errors.Unavailable(""), attempt, math.inf) for attempt in range(1, 6)]
    assert [pause is not None for pause in pauses] == [attempt < attempts for attempt in range(1, 6)]


@pytest.mark.parametrize("asked_s", [None, 0.5])
@pytest.mark.parametrize(
    ("kind", "without", "within"),
    [
        (errors.Unavailable, True, True),
        (errors.ModelNotReady, True, True),
        (errors.Overloaded, False, True),
        (errors.InvalidInput, False, False),
        (errors.DeadlineExceeded, False, False),
        (errors.Forbidden, False, False),
        (errors.EngineFault, False, False),
        (errors.HedgerowError, False, False),
    ],
)
def test_only_what_may_pass_is_tried_again(
    kind: type[errors.HedgerowError], without: bool, within: bool, asked_s: float | None
) -> None:
    pause_s = Retries(2).pause_s(kind("", retry_after_s=asked_s), 1, math.inf)
    assert (pause_s is not None) is (without if asked_s is None else within)


def test_callers_do_not_come_back_all_at_once() -> None:
    asked = [Retries(2).pause_s(errors.Unavailable("", retry_after_s=1.0), 1, math.inf) or 0 for _ in range(200)]
    free = [Retries(2).pause_s(errors.Unavailable(""), 1, math.inf) or 0 for _ in range(200)]
    for pauses, start_s in ((asked, 1.0), (free, 0.0)):
        assert min(pauses) < start_s + FIRST_PAUSE_S / 4
        assert max(pauses) > start_s + FIRST_PAUSE_S * 3 / 4
        assert all(start_s <= pause_s <= start_s + FIRST_PAUSE_S for pause_s in pauses)


@given(st.lists(st.booleans(), max_size=200))
def test_retries_stay_a_share_of_the_calls(moves: list[bool]) -> None:
    retries, calls, tried = Retries(10), 0, 0
    for is_call in moves:
        if is_call:
            retries.called()
            calls += 1
        else:
            tried += retries.pause_s(errors.Unavailable(""), 1, math.inf) is not None
        assert tried <= RETRY_BURST + RETRY_SHARE * calls + 1e-6
