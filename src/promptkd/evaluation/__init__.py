"""What came of it: predictions, scores, intervals, exposure bias, the prompt's effect."""
