"""Which loss learns from stale groups: a study of losses, staleness and seeds. `python -m benchmarks.staleness`."""
