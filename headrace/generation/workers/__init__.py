"""Worker processes that run a task's code: rewards and environments. What both have in common."""
