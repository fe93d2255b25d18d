"""The way to the model for environments: an OpenAI-compatible endpoint that keeps the exact tokens of every episode.

`segments` decides, without IO, which recorded tokens a request continues; `server` answers requests by it.
"""
