"""Control's routes: what is read comes from the picture, what is ordered goes to Redis with an event of who ordered
it."""
