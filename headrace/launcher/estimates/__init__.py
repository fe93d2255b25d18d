"""Estimates of what a run needs, from its settings alone: memory of devices and host, disk, traffic, time."""
