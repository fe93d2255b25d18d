"""Between Redis and the step: issues tickets and takes groups in.

Each group is trained once or settled with a reason. The next checkpoint records every consumed group.
"""
