"""A generation replica: leases tickets, drives SGLang, scores completions, commits groups."""
