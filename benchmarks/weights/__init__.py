"""Questions about weight versions: bytes, the time that a step waits for them, and how they reach many replicas."""
