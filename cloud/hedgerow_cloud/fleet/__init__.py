"""What the fleet knows and tells its devices."""
