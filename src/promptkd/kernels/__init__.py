"""Faster equivalents of parts of a model on the CPU, behind one call."""
