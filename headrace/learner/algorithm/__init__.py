"""The algorithm as pure functions: advantages, the loss, trust regions, staleness, the divergence guard.

Knows nothing of Redis, files or devices. The equations are in docs/algorithm.md.
"""
