"""Commands that measure the numbers of the documentation; most write their rows to `benchmarks/results/` as well."""
