"""The edge answers what its gate lets pass; the cloud answers the rest, if privacy, health and the deadline allow."""

from hedgerow.policies import Attempt, Facts, Plan, Tier, cloud_barred, cloud_first

FALLBACK = cloud_first.plan
"""Asked instead where no gate can judge the edge's answers: none of them may be taken for good."""


def plan(facts: Facts) -> Plan:
    """See the module."""
    if facts.gate_reason:
        return FALLBACK(facts)
    barred = cloud_barred(facts)
    attempts = [Attempt(Tier.EDGE, gated=True)]
    if not barred:
        attempts.append(Attempt(Tier.CLOUD))
    return Plan(tuple(attempt for attempt in attempts if attempt.tier not in facts.tried), (barred,) if barred else ())
