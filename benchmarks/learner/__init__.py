"""Benchmarks of the learner's passes: tokens per second, memory, and a GPU without SGLang."""
