"""Tests of several services at once: whole runs, chaos, Compose, the protocol."""
