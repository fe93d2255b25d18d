"""The number of replicas that keeps the learner busy: advice from measured waits, and a simulation of other numbers."""
