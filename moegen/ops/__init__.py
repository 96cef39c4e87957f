"""Leaf ops: what each computes, and what it costs."""
