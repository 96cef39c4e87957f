"""Mixtures of experts that are the whole model, on vectors: one example is one row."""
