"""The run's front door: one snapshot of Redis for every reader, and orders written where everybody obeys them."""
