"""Writing responses: engines, how a token is chosen, caches, and who may write in a run."""
