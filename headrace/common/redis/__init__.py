"""Redis: the names of a run's keys, connections, retries, and the master that is asked.

A command either reaches the run's one master or ends in a typed error.
"""
