"""moegen: a declarative architecture compiler for Mixture-of-Experts models."""

from __future__ import annotations

from moegen.errors import BackendError as BackendError
from moegen.errors import MoegenError as MoegenError
from moegen.errors import PackageError as PackageError
from moegen.errors import PlanError as PlanError
from moegen.errors import SpecError as SpecError

__version__ = "0.1.0"

_DOOR = {
    "Estimate": "moegen.estimator",
    "Plan": "moegen.planner",
    "backends": "moegen.backend",
    "build": "moegen.api",
    "check": "moegen.api",
    "estimate": "moegen.api",
    "load": "moegen.api",
    "module": "moegen.api",
    "plan": "moegen.api",
}

__all__ = [
    "BackendError",
    "MoegenError",
    "PackageError",
    "PlanError",
    "SpecError",
    "__version__",
    *_DOOR,
]


def __getattr__(name: str) -> object:
    """Import what is asked for, so that `import moegen` does not import torch."""
    if name not in _DOOR:
        raise AttributeError(f"module 'moegen' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_DOOR[name]), name)
