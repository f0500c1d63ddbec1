"""The story that `scripts/quickstart` tells: the whole loop on real data, every claim checked as it goes.

`story` has the steps in their order, `attack` what is done to the fleet in the last one, `traffic` the requests and
what comes back, `scene` what the steps share.
"""
