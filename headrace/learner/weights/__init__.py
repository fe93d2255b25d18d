"""Publishing weight versions: files first, then Redis, then a hint to each replica.

A version that is announced can be fetched.
"""
