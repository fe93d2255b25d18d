"""The replica's weights: which versions there are, the cheapest way to the newest, fetched, checked, swapped in."""
