"""Is the run well? Checks from inputs to results, and the verdict: the worst result as one sentence with advice."""
