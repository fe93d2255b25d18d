"""The `headrace` command: runs the services of one run on one machine and shows how it goes."""
