"""Rewards, computed in worker processes that may fail, hang or grow without harm to the replica."""
