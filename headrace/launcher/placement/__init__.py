"""The assignment of GPUs to a run's services, and the split of one GPU between learner and engine."""
