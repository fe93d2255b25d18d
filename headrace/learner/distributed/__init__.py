"""The learner's ranks: who they are, how they call each other, how parameters and their files are sharded.

One rank is the case without any of it.
"""
