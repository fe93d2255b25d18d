"""Which GPUs the services of a run get, and how one GPU is shared."""
