"""The machine's identity, its GPUs, and their assignment to services. Imports no torch."""
