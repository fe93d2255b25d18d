"""Computes rewards in worker processes that may fail, hang or use too much memory without harm to the replica."""
