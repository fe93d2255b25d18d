"""What the learner says of the run: rows of metrics, trackers, the summary, Prometheus, its HTTP side.

Nothing here can stop a step.
"""
