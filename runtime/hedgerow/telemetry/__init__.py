"""What can be seen of a process: its `logs`, `metrics` and `tracing`, and the page for people (`diagnostics`)."""
