"""Tasks and policies that other benchmarks train on."""
