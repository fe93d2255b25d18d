"""Keeps the services of a run going until its learner has ended, then ends them in order."""
