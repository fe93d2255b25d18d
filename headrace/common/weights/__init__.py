"""Weight versions as files: manifests, deltas, and the memory-backed folder for weights on their way to an engine.

A delta restores the exact bytes; every file is known by its digest.
"""
