"""Code that every service shares: configuration, wire format, keys, tasks. Imports no service."""
