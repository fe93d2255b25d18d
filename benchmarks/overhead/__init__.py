"""Benchmarks of overhead: the cost of durability, and of pages and requests for the control service."""
