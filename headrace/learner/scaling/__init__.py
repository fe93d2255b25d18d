"""How many replicas would keep the learner busy: advice from measured waits, and a simulation of others."""
