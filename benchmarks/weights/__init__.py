"""Benchmarks of weight versions: their size, how long a step waits for them, and how they reach many replicas."""
