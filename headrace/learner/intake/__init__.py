"""Between Redis and the step: tickets out, groups in.

Each group is trained once or settled with a reason; what is consumed is known to the next checkpoint.
"""
