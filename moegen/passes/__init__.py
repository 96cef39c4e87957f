"""Passes: a graph in, the same graph annotated or rewritten; one a file."""
