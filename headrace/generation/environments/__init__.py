"""Plays the episodes of tasks with `rollout`, in worker processes that may fail, hang or use too much memory."""
