"""Commands about a run's data: audit, dead letters, export, record, simulated plans. Each is a program of its own."""
