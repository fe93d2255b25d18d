"""How a running learner is steered: requests to pause, stop or checkpoint, and the configuration that applies now."""
