"""When a process that keeps ending is started again."""

from hedgerow.restarts import Restarts, RestartSettings


def test_pauses_grow_up_to_their_limit_and_shrink_when_it_has_been_quiet() -> None:
    rule = Restarts(RestartSettings(backoff_s=1.0, max_backoff_s=5.0, max_restarts=9, window_s=100.0))
    assert [rule.ended(0.0) for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    rule.started()
    assert rule.ended(101.0) == 102.0


def test_too_many_ends_in_the_window_are_followed_by_a_cool_down_and_a_clean_slate() -> None:
    rule = Restarts(RestartSettings(backoff_s=1.0, max_restarts=2, window_s=10.0, cool_down_s=50.0))
    rule.ended(0.0)
    rule.ended(5.0)
    rule.started()
    assert rule.ended(11.0) == 13.0  # the first is out of the window
    assert not rule.given_up
    assert rule.ended(12.0) == 62.0
    assert rule.given_up
    assert rule.ended(63.0) == 113.0  # the attempt after it failed too
    assert rule.given_up
    rule.started()
    assert not rule.given_up
    assert rule.ended(114.0) == 115.0
