"""`headrace try`: plays a few rollouts of a task and prints the conversations. Nothing keeps running."""
