"""Fusions that backends choose from: each is a rewrite of one graph."""
