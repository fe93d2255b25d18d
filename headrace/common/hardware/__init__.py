"""Which machine this is, which GPUs it has, and which service gets which of them. Imports no torch."""
