"""What control reads from a run: Redis in one round trip, the learner's status, history and samples kept in memory."""
