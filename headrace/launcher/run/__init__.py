"""A run on this machine: its folder, its processes, its logs, its Redis, a client of its control service."""
