"""Questions about SGLang under changing weights: what a swap costs, and how exact log-probabilities stay."""
