"""A replica's tickets: leases, commits, retries on other replicas, and the heartbeats of those.

One script moves a ticket out of its stream, exactly once.
"""
