"""Which GPUs the services of a run get, and how learner and engine share one GPU."""
