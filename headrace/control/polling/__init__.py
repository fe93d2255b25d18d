"""Control's reads of a run: Redis in one round trip, the learner's status, and history and samples kept in memory."""
