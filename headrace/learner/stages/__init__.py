"""What the loop does between steps, most of it beside the next one: publish, checkpoint, evaluate, wait.

The loop is held up for a copy of the tensors; each wait has a reason and a deadline.
"""
