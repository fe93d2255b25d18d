"""What one learner and one Redis carry, with simulated engines. `python -m benchmarks.scale`."""
