"""Checkpoints: what a learner needs to resume exactly where it stopped, durable before anything relies on it."""
