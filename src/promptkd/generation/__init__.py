"""Generating responses: engines, how a token is chosen, caches, and who may generate in a run."""
