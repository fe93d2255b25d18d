"""One SGLang server: started, supervised, called, swapped to other weights while requests are in flight.

Each call has a deadline; each token has the version that sampled it.
"""
