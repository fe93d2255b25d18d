"""Is the run well? Facts in, findings out, the worst as one sentence."""
