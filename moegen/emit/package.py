"""Turns a plan into a package: a mapping from file names to text, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path as FilePath
from typing import Any

from moegen.backend import Backend
from moegen.emit.classes import RECORDS, Classes
from moegen.emit.parts import table
from moegen.emit.words import class_docs, model_docs
from moegen.planner import Plan
from moegen.spec.load import resolved_yaml
from moegen.spec.source import read_text


@dataclass(frozen=True)
class Package:
    """The files of an emitted model. Pure text, so that it can be compared without a disk."""

    name: str
    files: Mapping[str, str]


def package(plan: Plan, backend: Backend) -> Package:
    """Emit a plan for a backend.

    Lines of the spec that the code mentions are those of the package's own spec.yaml.
    """
    import moegen

    resolved = resolved_yaml(dict(plan.data))
    plan = replace(plan, marks=read_text(resolved, "spec.yaml").marks)
    kind = plan.spec.model.runtime
    classes = Classes(
        docs=lambda component: class_docs(plan, component),
        base=kind,
        default=plan.spec.precision.parameter_dtype,
        records=dict(plan.records),
        said={**RECORDS, **plan.spec.model.records},
        parts=table(plan),
    )
    body = classes.text(plan.components)
    files = {
        "__init__.py": _door(plan),
        "model.py": _model(plan, classes, body),
        "ops.py": backend.ops(classes.ops),
        **backend.files(classes.ops),
        "network.py": runtime("Network"),
        "runtime.py": runtime(kind),
        "spec.yaml": resolved,
        "py.typed": "",
    }
    facts = {
        "moegen": moegen.__version__,
        "backend": backend.name,
        "spec": plan.spec.name,
        "classes": {c.class_name: class_place(plan, c) for c in plan.components},
        "parameters": {r: n for r, (n, _, _) in sorted(plan.root.totals().items())},
        "files": {name: _hash(text) for name, text in sorted(files.items())},
    }
    files["plan.json"] = json.dumps(facts, indent=2) + "\n"
    return Package(plan.spec.name, dict(sorted(files.items())))


def class_place(plan: Plan, component: Any) -> dict[str, Any]:
    """Where a class comes from: its path in the spec, and the line there."""
    mark = plan.mark(component.path)
    place: dict[str, Any] = {"path": ".".join(map(str, component.path))}
    if mark is not None:
        place |= {"line": mark.line, "file": FilePath(mark.file).name}
    return place


def runtime(kind: str) -> str:
    """A base class of models, as the file that moegen tests in place."""
    name = f"{_snake(kind)}.py"
    return (resources.files("moegen.emit.runtime") / name).read_text(encoding="utf-8")


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).strip("_")


def _door(plan: Plan) -> str:
    records = sorted(r for r in plan.records if r in ("Output", "Routing"))
    names = sorted(["Model", *records])
    lines = [f'"""{plan.spec.name}: import Model from here."""', ""]
    lines += [f"from .model import {name} as {name}" for name in names]
    return "\n".join(lines) + "\n"


def _model(plan: Plan, classes: Classes, body: str) -> str:
    uses = {
        "import torch\n": "torch." in body,
        "import torch.nn.functional as F\n": "F." in body,
    }
    names = ["Tensor", "nn"] if "Tensor" in body else ["nn"]
    imports = "".join(line for line, used in uses.items() if used)
    imports += f"from torch import {', '.join(names)}\n"
    typed = [n for n, use in (("Any", ": Any ="), ("NamedTuple", "(NamedTuple)")) if use in body]
    typing = f"from typing import {', '.join(typed)}\n\n" if typed else ""
    ours = _import_ops(sorted(classes.ops & _mentioned(body, classes.ops)))
    base = f"from .runtime import {plan.spec.model.runtime}\n"
    part = "from .network import Part\n" if classes.parts else ""
    head = f'"""{model_docs(plan)}\n"""\n\nfrom __future__ import annotations\n\n'
    return f"{head}{typing}{imports}\n{part}{ours}{base}\n\n{body}\n"


def _mentioned(body: str, names: set[str]) -> set[str]:
    return {name for name in names if re.search(rf'(?<![\w."]){name}(?![\w"])', body)}


def _import_ops(names: list[str]) -> str:
    if not names:
        return ""
    line = f"from .ops import {', '.join(names)}\n"
    if len(line) <= 89:
        return line
    inner = "".join(f"    {name},\n" for name in names)
    return f"from .ops import (\n{inner})\n"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
