"""What a process needs of its own: logs, child processes, typed waits, atomic files, the run's token.

Imports nothing else of Headrace.
"""
