"""The learner's ranks: starting and joining them, communication, sharding of parameters and of state files.

With a single rank nothing is sharded or sent.
"""
