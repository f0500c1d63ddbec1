"""Who answers, who watches and who may ask: backends around backends (`split`, `shadow`, `quotas`) and their rules."""
