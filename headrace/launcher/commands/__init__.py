"""The `headrace` command's parts: a module is a panel of `headrace --help`."""
