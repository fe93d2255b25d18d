"""The policy on its device: from packed sequences to log-probabilities of the trained tokens.

The weights come out under the names and in the shapes of the model's own checkpoint.
"""
