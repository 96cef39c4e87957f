"""Base classes of emitted models: ordinary files, copied into packages as they are."""
