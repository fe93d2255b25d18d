"""What the HTTP side of each service shares: who may change something, limits, errors as problem details."""
