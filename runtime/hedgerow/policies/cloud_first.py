"""The cloud answers; the edge stands in, marked degraded, where it cannot."""

from hedgerow.policies import Attempt, Facts, Plan, Tier, cloud_barred


def plan(facts: Facts) -> Plan:
    """See the module. An answer of the edge is no second best where the route has no cloud and the model no gate."""
    barred = cloud_barred(facts)
    attempts = [] if barred else [Attempt(Tier.CLOUD)]
    attempts.append(Attempt(Tier.EDGE, degraded=facts.cloud is not None or facts.gate_refused))
    reasons = tuple(reason for reason in (barred, facts.gate_reason) if reason)
    return Plan(tuple(attempt for attempt in attempts if attempt.tier not in facts.tried), reasons)
