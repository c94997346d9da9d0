"""Measurements of models: predictions, scores, intervals, exposure bias, the prompt's effect."""
