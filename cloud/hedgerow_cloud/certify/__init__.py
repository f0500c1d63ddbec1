"""From calibration data to a gate that somebody can sign for: bounds, thresholds, the choice of a score, the page."""
