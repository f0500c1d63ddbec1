"""What any policy may plan, whatever the facts: privacy first, and always with a reason."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hedgerow import policies
from hedgerow.backend import Snapshot
from hedgerow.errors import ConfigError
from hedgerow.policies import Attempt, Facts, Plan, Privacy, Tier, cloud_first, edge_first

SNAPSHOTS = st.builds(
    Snapshot,
    healthy=st.booleans(),
    inflight=st.integers(0, 1000),
    latency_p50_s=st.none() | st.floats(0, 10),
    latency_p95_s=st.none() | st.floats(0, 10),
    reason=st.sampled_from(["", "circuit open"]),
)
FACTS = st.builds(
    lambda gate, **others: Facts(gate_reason=gate, gate_refused=gate == "refused", **others),
    model=st.just("digits"),
    remaining_s=st.floats(0, 10) | st.just(math.inf),
    edge=SNAPSHOTS,
    cloud=st.none() | SNAPSHOTS,
    privacy=st.sampled_from(Privacy),
    gate=st.sampled_from(["", "no gate", "refused"]),
    tried=st.frozensets(st.sampled_from(Tier)),
)
EVERY_POLICY = pytest.mark.parametrize("name", policies.known())
UP = Snapshot(healthy=True, latency_p95_s=0.06)


def facts(**changes: object) -> Facts:
    return Facts(**{"model": "digits", "remaining_s": 1.0, "edge": Snapshot(healthy=True), "cloud": UP} | changes)  # type: ignore[arg-type] # a test's shorthand


@EVERY_POLICY
@given(facts=FACTS)
def test_an_edge_only_request_is_never_planned_for_the_cloud(name: str, facts: Facts) -> None:
    plan = policies.load(name)(facts)
    if facts.privacy is Privacy.EDGE_ONLY:
        assert all(attempt.tier is not Tier.CLOUD for attempt in plan.attempts)


@EVERY_POLICY
@given(facts=FACTS)
def test_plans_are_valid_and_give_reasons(name: str, facts: Facts) -> None:
    plan = policies.load(name)(facts)
    tiers = [attempt.tier for attempt in plan.attempts]
    assert len(set(tiers)) == len(tiers)
    assert not facts.tried.intersection(tiers)
    assert plan.attempts or Tier.EDGE in facts.tried, "with nothing tried there is always something to try"
    if Tier.CLOUD in tiers:
        assert facts.cloud is not None
        assert facts.cloud.healthy
        assert facts.cloud.latency_p95_s is None or facts.remaining_s >= facts.cloud.latency_p95_s
    elif Tier.CLOUD not in facts.tried:
        assert plan.reasons
    if facts.gate_refused or (facts.gate_reason and facts.cloud is not None):
        assert not any(a.tier is Tier.EDGE and not a.degraded for a in plan.attempts), "unjudged is second best"
    assert policies.load(name)(facts) == plan, "pure"


def test_edge_first_asks_the_edge_then_the_cloud() -> None:
    assert edge_first.plan(facts()) == Plan((Attempt(Tier.EDGE, gated=True), Attempt(Tier.CLOUD)))
    assert edge_first.plan(facts(tried=frozenset({Tier.EDGE}))) == Plan((Attempt(Tier.CLOUD),))


def test_edge_first_without_a_gate_is_cloud_first() -> None:
    unjudged = facts(gate_reason="gate refused: other digests")
    assert edge_first.plan(unjudged) == cloud_first.plan(unjudged)
    assert edge_first.plan(unjudged).attempts[0].tier is Tier.CLOUD
    assert edge_first.plan(unjudged).reasons == ("gate refused: other digests",)


def test_without_any_cloud_an_unjudged_answer_is_the_answer_unless_there_should_be_a_judge() -> None:
    assert edge_first.plan(facts(cloud=None, gate_reason="no gate")).attempts == (Attempt(Tier.EDGE),)
    refused = facts(cloud=None, gate_reason="gate refused: other digests", gate_refused=True)
    assert edge_first.plan(refused).attempts == (Attempt(Tier.EDGE, degraded=True),)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"remaining_s": 0.0129}, "deadline too close: 12 ms left, cloud p95 is 60 ms"),
        ({"cloud": Snapshot(healthy=False, reason="circuit open: cannot connect")}, "cloud unavailable: circuit open"),
        ({"cloud": None}, "no cloud configured"),
        ({"privacy": Privacy.EDGE_ONLY}, "privacy: edge-only"),
    ],
)
def test_what_bars_the_cloud_is_said_in_words(changes: dict[str, object], words: str) -> None:
    assert words in edge_first.plan(facts(**changes)).reasons[0]


def test_an_unknown_policy_is_a_wrong_setting_that_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="edge_first"):
        policies.load("edge_frist")
