"""The run's health: checks from inputs to results, and the verdict, the worst result as one sentence with advice."""
