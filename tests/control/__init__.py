"""Tests of the control service and its live page."""
