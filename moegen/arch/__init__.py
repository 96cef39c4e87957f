"""The vocabulary of architectures: one element a file, with its fields, rules and computation."""
