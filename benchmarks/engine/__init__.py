"""Benchmarks of SGLang under changing weights: the cost of a swap, and how exact log-probabilities stay."""
