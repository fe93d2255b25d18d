"""The launcher's and the commands' tests."""
