"""The learner's side of Redis: each write is one script that checks the learner's fencing epoch first."""
