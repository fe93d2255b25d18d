"""A replica's tests."""
