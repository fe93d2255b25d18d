"""The policy on its device: from packed sequences to log-probabilities of the trained tokens.

Weights are published with the names and shapes of the model's pretrained checkpoint.
"""
