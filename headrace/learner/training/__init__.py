"""One step: a batch of groups becomes optimizer updates and a row of metrics, on one rank or several."""
