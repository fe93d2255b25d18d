"""New weights for an engine whose requests go on: checks before, the swap, its confirmation, and progress after it."""
