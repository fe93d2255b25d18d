"""An engine's tensors by name, shape and checksum, and their expected values after a swap. Pure, except for file
reads."""
