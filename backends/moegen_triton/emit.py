"""What a package is given of this backend: its kernels as they are, and doors to them in ops.py."""

from __future__ import annotations

import ast
from functools import lru_cache
from importlib import resources

from moegen.emit.sources import ops_module

# The module below kernels/ that has an op.
KERNELS = {
    "routed_feed_forward": "feed_forward",
    "grouped_feed_forward": "feed_forward",
    "grouped_linear": "linear",
    "grouped_bias": "linear",
    "gather_rows": "combine",
    "combine": "combine",
    "sort_by_expert": "dispatch",
    "expert_load": "dispatch",
    "route": "router",
    "swiglu": "dense",
    "geglu": "dense",
    "reglu": "dense",
    "clamped_swiglu": "dense",
}
FOLDER = "kernels"


def ops_text(ops: set[str]) -> str:
    """The text of ops.py: kernels where there are any, and plain PyTorch for the other ops."""
    doors = {name: f".{FOLDER}.{module}" for name, module in KERNELS.items()}
    return ops_module(ops, doors)


def kernel_files(ops: set[str]) -> dict[str, str]:
    """The files of kernels that ops need, with all that these import, byte for byte."""
    todo = [KERNELS[name] for name in sorted(ops) if name in KERNELS]
    found = {"__init__"} if todo else set()
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += _imported(name)
    return {f"{FOLDER}/{name}.py": _source(name) for name in sorted(found)}


@lru_cache(maxsize=64)
def _source(name: str) -> str:
    place = resources.files(__package__) / FOLDER / f"{name}.py"
    return place.read_text(encoding="utf-8")


@lru_cache(maxsize=64)
def _imported(name: str) -> tuple[str, ...]:
    """The kernel files that one imports, which it does relatively."""
    nodes = ast.walk(ast.parse(_source(name)))
    found = (n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.level == 1)
    return tuple(module for module in found if module)
