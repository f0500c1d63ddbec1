"""The install machine: whatever happens, in whatever order, with the process killed anywhere."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hedgerow_edge.install import (
    LOADED,
    MAX_CRASHES,
    MAX_REASON_CHARS,
    MAX_REJECTED,
    TABLE,
    Activated,
    Begin,
    Broken,
    Damaged,
    Died,
    Event,
    Fetched,
    Install,
    Interrupted,
    Passed,
    Phase,
    Prove,
    Proved,
    Rejected,
    Rejection,
    Release,
    Stopped,
    Superseded,
    step,
)


def digest(counter: int) -> str:
    return hashlib.sha256(str(counter).encode()).hexdigest()


def begin(counter: int) -> Begin:
    return Begin(counter=counter, manifest=digest(counter))


def run(install: Install, *events: Event) -> Install:
    for event in events:
        install = step(install, event)
    return install


TO_PROBATION = (Fetched("cpu"), Prove(), Proved(), Activated())

ONE_OF_EACH: dict[type[Event], Event] = {
    Begin: begin(1),
    **{kind: kind("why") for kind in (Interrupted, Fetched, Damaged, Rejected, Broken)},
    **{kind: kind() for kind in (Prove, Proved, Activated, Passed, Superseded, Stopped, Died)},
}
EVENTS: dict[type[Event], st.SearchStrategy[Event]] = {
    **{kind: st.just(event) for kind, event in ONE_OF_EACH.items()},
    Begin: st.builds(begin, st.integers(1, 6)),
    Rejected: st.builds(Rejected, st.sampled_from(["NaN", "x" * 2 * MAX_REASON_CHARS])),
}


@settings(max_examples=300)
@given(st.data())
def test_any_history_keeps_the_invariants(data: st.DataObject) -> None:
    now, rejected, deaths = Install(), set[str](), 0
    for _ in range(data.draw(st.integers(1, 50))):
        before = now
        possible = list(TABLE[before.phase])
        event = data.draw(EVENTS[data.draw(st.sampled_from(possible))])
        try:
            now = step(now, event)
        except ValueError:
            if isinstance(event, Begin):
                assert not before.wants(event.counter, event.manifest)
            else:
                assert isinstance(event, Broken)
                assert before.active is None
            continue
        # 1: only a passed probation or broken files change what a restart serves
        if now.active != before.active:
            assert isinstance(event, (Passed, Broken))
        if isinstance(event, Passed):
            assert before.phase is Phase.PROBATION
            assert (now.active, now.previous) == (before.target, before.active)
        assert now.floor >= before.floor
        assert now.active is None or now.floor >= now.active.counter
        # 2 and 3: nobody's slot is another's, and a target stands exactly outside idle
        assert (now.target is not None) == (now.phase is not Phase.IDLE)
        held = [release.slot for release in (now.active, now.previous, now.target) if release]
        assert len(set(held)) == len(held)
        # 4: a rejected manifest never comes back
        if isinstance(event, Begin):
            assert event.manifest not in rejected
            assert event.counter >= before.floor
            deaths = 0
        rejected = {entry.manifest for entry in now.rejected} | rejected
        # 5 and 6: death undoes what was half done, and only so often
        if isinstance(event, Died):
            deaths += before.phase in LOADED
            assert now.phase not in LOADED
            assert deaths <= MAX_CRASHES
            assert (now.phase is Phase.IDLE) == (before.phase is Phase.IDLE or deaths == MAX_CRASHES)
        assert now.crashes < MAX_CRASHES
        assert len(now.reason) <= MAX_REASON_CHARS


def test_an_update_serves_the_old_release_until_the_new_one_takes_over_and_keeps_it_to_return_to() -> None:
    first = run(Install(), begin(1), *TO_PROBATION, Passed())
    now = first
    for event in (begin(2), Fetched("cpu"), Prove(), Proved()):
        now = step(now, event)
        assert now.serving == first.active
    now = step(now, Activated())
    assert now.serving is not None
    assert now.serving.counter == 2
    assert step(now, Died()).serving == first.active
    assert step(now, Rejected("NaN")).serving == first.active
    done = step(now, Passed())
    assert done.active == now.serving
    assert done.previous == first.active
    assert step(done, Broken("a bit flipped")).serving == first.active


def test_a_release_that_kills_the_process_is_given_up_for_good() -> None:
    now = run(Install(), begin(1), *TO_PROBATION, Passed(), begin(2), Fetched("cpu"))
    for death in range(MAX_CRASHES):
        assert now.phase is Phase.STAGED
        now = run(now, *(Prove(), Proved())[: 1 + death % 2], Died())
    assert now.phase is Phase.IDLE
    assert now.active is not None
    assert now.active.counter == 1
    assert f"died {MAX_CRASHES} times" in now.reason
    assert not now.wants(2, digest(2))
    with pytest.raises(ValueError, match="rejected"):
        step(now, begin(2))


def test_stops_in_good_order_and_lost_power_while_fetching_are_not_held_against_a_release() -> None:
    now = step(Install(), begin(1))
    for _ in range(5 * MAX_CRASHES):
        now = run(now, Died(), Interrupted("no link"))
    now = step(now, Fetched("cpu"))
    for _ in range(5 * MAX_CRASHES):
        now = run(now, Prove(), Proved(), Activated(), Stopped(), Died())
    assert (now.phase, now.crashes) == (Phase.STAGED, 0)


def test_rejections_are_remembered_until_a_newer_release_is_confirmed() -> None:
    now = Install()
    for counter in range(1, MAX_REJECTED + 3):
        now = run(now, begin(counter), Rejected("no variant"))
    assert len(now.rejected) == MAX_REJECTED
    last = MAX_REJECTED + 2
    assert now.rejected[-1] == Rejection(counter=last, manifest=digest(last), reason="no variant")
    now = run(now, begin(1000), *TO_PROBATION, Passed())
    assert (now.rejected, now.reason) == ((), "")


def test_what_a_phase_does_not_know_is_an_error_in_the_caller() -> None:
    for phase, row in TABLE.items():
        now = Install(phase=phase, target=None if phase is Phase.IDLE else Release(counter=1, manifest="", slot="a"))
        for kind in set(EVENTS) - set(row):
            with pytest.raises(ValueError, match="cannot happen"):
                step(now, ONE_OF_EACH[kind])


def test_every_phase_takes_every_end_of_the_process() -> None:
    assert set(TABLE) == set(Phase)
    for phase, row in TABLE.items():
        assert {Stopped, Died} <= set(row)
        assert row[Stopped] not in LOADED, phase
