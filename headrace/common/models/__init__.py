"""Properties of a model that are known without loading it: chat template, context length, control tokens, hub files.

Imports no torch.
"""
