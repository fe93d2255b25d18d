"""What a run will need, from its settings alone: memory of devices and host, disk, traffic, time."""
