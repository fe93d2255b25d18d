"""The control service of a run: one poller of Redis for all readers, the REST API and the live page."""
