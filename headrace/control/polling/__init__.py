"""What control reads of a run: Redis in one round trip, the learner's answers, history and samples in memory."""
