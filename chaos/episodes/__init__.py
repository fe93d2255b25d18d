"""The kill matrix with episodes of several turns: its recipe and task, faults in the middle of an episode, and the
checks of every group."""
