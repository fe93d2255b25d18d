"""The stages of the loop between steps: publish, checkpoint, evaluate, wait.

Publishing and checkpointing run beside the next step: the loop waits only for a copy of the tensors. Each wait has a
reason and a deadline.
"""
