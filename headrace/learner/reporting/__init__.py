"""Reporting on the run: rows of metrics, trackers, the summary, Prometheus, the learner's HTTP service.

Nothing here can stop a step.
"""
