"""Turns the text of a spec into validated elements, or into problems with their places."""
