"""Which endpoint is asked: never one that is down while another is up, and never nobody while one could answer."""

import random
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from hedgerow.remote.balancing import EJECTED_S, FAULTS_TO_EJECT, MAX_EJECTED_S, Conduct, choose, may_eject

NOW = 1000.0


@dataclass(eq=False)
class Place:
    zone: str = ""
    open: bool = False
    seconds: float = 0.1
    inflight: int = 0
    conduct: Conduct = field(default_factory=Conduct)

    def ejected(self, now: float) -> bool:
        return self.conduct.ejected(now)

    def cost(self, now: float) -> float:
        return self.seconds * (self.inflight + 1)


def place(zone: str, is_open: bool, ejected: bool) -> Place:
    return Place(zone, is_open, conduct=Conduct(until=NOW + ejected))


places = st.lists(st.builds(place, st.sampled_from("ab"), st.booleans(), st.booleans()), max_size=12)


@given(places, st.sampled_from(["", "a", "c"]), st.integers(0, 2**12), st.integers())
def test_who_is_down_is_left_alone_and_somebody_is_asked_while_one_is_up(
    candidates: list[Place], zone: str, avoided: int, seed: int
) -> None:
    avoid = {one for index, one in enumerate(candidates) if avoided >> index & 1}
    chosen = choose(candidates, zone=zone, now=NOW, draw=random.Random(seed), avoid=avoid)
    closed = [one for one in candidates if not one.open]
    if not closed:
        assert chosen is None
        return
    assert chosen in closed
    if chosen in avoid:
        assert all(one in avoid for one in closed), "it has just failed, and there was another"
    elif chosen.ejected(NOW):
        assert all(one.ejected(NOW) or one in avoid for one in closed)


def share_of_zone_a(candidates: list[Place]) -> float:
    draw = random.Random(1)
    chosen = [choose(candidates, zone="a", now=NOW, draw=draw) for _ in range(4000)]
    return sum(one is not None and one.zone == "a" for one in chosen) / len(chosen)


def test_a_zone_that_is_well_keeps_its_requests_and_one_that_is_not_spills_over() -> None:
    near, far = [Place("a") for _ in range(10)], [Place("b") for _ in range(10)]
    assert share_of_zone_a(near + far) == 1.0
    for one in near[:2]:
        one.open = True
    assert share_of_zone_a(near + far) == 1.0, "8 of 10 can bear it"
    for one in near[:5]:
        one.open = True
    assert 0.7 < share_of_zone_a(near + far) < 0.95
    for one in near:
        one.open = True
    assert share_of_zone_a(near + far) == 0.0


def test_a_slow_endpoint_gets_less_and_a_busy_one_too() -> None:
    quick, slow, draw = Place(seconds=0.01), Place(seconds=0.1), random.Random(1)
    chosen = []
    for _ in range(100):
        one = choose([quick, slow], zone="", now=NOW, draw=draw)
        assert one is not None
        one.inflight += 1
        chosen.append(one)
    assert 85 <= chosen.count(quick) <= 95


def test_ejections_grow_longer_are_bounded_and_forgotten_by_good_conduct() -> None:
    conduct, now, seconds = Conduct(), NOW, []
    for _ in range(12):
        assert [conduct.faulted() for _ in range(FAULTS_TO_EJECT)] == [False] * (FAULTS_TO_EJECT - 1) + [True]
        seconds.append(conduct.eject(now))
        assert conduct.ejected(now)
        now += seconds[-1]
        assert not conduct.ejected(now), "it comes back by itself"
    assert seconds[:3] == [EJECTED_S, 2 * EJECTED_S, 3 * EJECTED_S]
    assert seconds[-1] == MAX_EJECTED_S
    assert conduct.eject(now + 3600) == EJECTED_S
    for _ in range(10):
        conduct.faulted()
        conduct.answered()
    assert not conduct.faulted(), "only faults in a row count"


@given(places.filter(bool), st.integers(min_value=0))
def test_the_last_that_answers_is_never_ejected_and_most_are_kept(candidates: list[Place], index: int) -> None:
    culprit = candidates[index % len(candidates)]
    already = sum(one.ejected(NOW) for one in candidates)
    if may_eject(culprit, candidates, NOW):
        assert any(one is not culprit and not one.open and not one.ejected(NOW) for one in candidates)
        assert already + 1 <= max(1, len(candidates) / 10)
