"""One training step: from a batch of groups to optimizer updates and a row of metrics, on one rank or several."""
