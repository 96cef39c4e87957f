"""Prints components as Python that reads as if written by hand."""
