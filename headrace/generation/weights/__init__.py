"""The replica's weights: finds the cheapest update path to the newest version, fetches, checks and swaps it in."""
