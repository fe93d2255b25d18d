"""Commands that print the numbers of the README; each writes its rows to `benchmarks/results/` as well."""
