"""The learner: tops up tickets, consumes groups, takes optimizer steps, publishes weight versions."""
