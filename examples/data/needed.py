"""Modules of packages that moegen does not need, but an example does."""

from __future__ import annotations

import importlib
from typing import Any

from moegen.errors import MoegenError, Problem


def needed(module: str) -> Any:
    """Import a module, or say how its package is installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        sentence = f"this example needs {module}, which cannot be imported: {error}"
        raise MoegenError(Problem(sentence, hint="run `pip install 'moegen[examples]'`")) from error
