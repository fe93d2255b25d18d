"""The learner's tests."""
