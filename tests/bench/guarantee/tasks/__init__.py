"""What the guarantee is tried on: a module a task, with `make(cache)` that gives its pool."""
