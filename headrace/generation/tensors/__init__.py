"""An engine's tensors by name, shape and checksum, and what they must be after a swap. Pure but for reading files."""
