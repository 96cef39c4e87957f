"""The intermediate representation: components, the builder that traces them, and their rules."""
