"""What is known of a model without loading it: chat template, context length, control tokens, files on the hub.

Imports no torch.
"""
