"""A run on this machine: its folder and lock, its processes, logs and Redis, and a client of its control service."""
