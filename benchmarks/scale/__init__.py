"""The load that one learner and one Redis can carry, with simulated engines. `python -m benchmarks.scale`."""
