"""A replica's tickets: leases, commits, retries on other replicas, and who those are.

A ticket leaves its stream in one script, once.
"""
