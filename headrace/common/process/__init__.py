"""A process's own tools: logs, child processes, typed waits, atomic files, the run's token.

Imports nothing else of Headrace.
"""
