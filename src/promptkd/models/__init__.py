"""Causal language models: loading them, their two halves, and the tokens that two of them share."""
