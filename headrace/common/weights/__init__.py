"""Weight versions as files: manifests, deltas, and the memory-backed folder that they pass through.

A delta restores the exact bytes; every file is known by its digest.
"""
