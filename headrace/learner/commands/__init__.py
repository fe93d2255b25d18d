"""Commands about a run's data: audit, dead letters, export, record, simulate. Each is a program of its own."""
