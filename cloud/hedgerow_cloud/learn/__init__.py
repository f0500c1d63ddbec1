"""From data to a certified release, on Ray."""
