"""Plays a few rollouts of a task for `headrace try`, with a replica's own parts, and reports the conversations."""
