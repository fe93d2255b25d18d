"""One SGLang server: starts, supervises and calls it, and swaps its weights while requests are in flight.

Each call has a deadline. Each token is tagged with the weight version that sampled it.
"""
