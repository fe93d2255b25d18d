"""The algorithm as pure functions: advantages, the loss, trust regions, staleness, the divergence guard.

It uses neither Redis nor files nor devices. The equations are in docs/algorithm.md.
"""
