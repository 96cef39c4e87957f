"""moegen: a declarative architecture compiler for Mixture-of-Experts models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moegen.errors import BackendError as BackendError
from moegen.errors import MoegenError as MoegenError
from moegen.errors import PackageError as PackageError
from moegen.errors import PlanError as PlanError
from moegen.errors import SpecError as SpecError

if TYPE_CHECKING:
    from moegen.api import build as build
    from moegen.api import check as check
    from moegen.api import estimate as estimate
    from moegen.api import load as load
    from moegen.api import module as module
    from moegen.api import plan as plan
    from moegen.backend import backends as backends
    from moegen.estimator import Estimate as Estimate
    from moegen.planner import Plan as Plan

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
