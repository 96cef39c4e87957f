"""The Python interface: a spec in, a plan, an estimate, a package or a module out."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from moegen.arch.spec import Spec
from moegen.backend import backend as find_backend
from moegen.choices import choose
from moegen.emit.package import Package, package
from moegen.emit.write import backend_of, differences, write
from moegen.errors import BackendError, PackageError, Problem
from moegen.gpus import GPUS
from moegen.optimizers import OPTIMIZERS
from moegen.passes.sizes import prove_sizes
from moegen.planner import Plan, Workload, lower
from moegen.plugins import load_installed
from moegen.spec.load import Loaded, load_file
from moegen.spec.load import load as load_source
from moegen.spec.names import identifier
from moegen.spec.source import read_text

Source = str | os.PathLike[str] | Mapping[str, Any] | Loaded[Spec] | Plan
Overrides = Sequence[str] | Mapping[str, Any]


def load(source: Source, overrides: Overrides = ()) -> Loaded[Spec]:
    """Read and validate a spec: a file's path, or its data as a mapping.

    overrides: `["moe.experts.count=64"]` or `{"moe.experts.count": 64}`.
    """
    if isinstance(source, Plan):
        return Loaded(source.spec, dict(source.data), dict(source.marks), ())
    if isinstance(source, Loaded):
        return source
    load_installed()
    changes = _strings(overrides)
    if isinstance(source, Mapping):
        from moegen.spec.load import resolved_yaml

        text = read_text(resolved_yaml(dict(source)), "<mapping>", changes, root=Spec)
        return Loaded(load_source(Spec, text), text.data, text.marks, text.files)
    return load_file(Spec, source, changes)


def plan(
    source: Source,
    overrides: Overrides = (),
    *,
    batch: int = 1,
    sequence: int | None = None,
    backend: str = "eager",
) -> Plan:
    """Lower a spec to components of known shape and cost, for a batch of sequences.

    backend: whose fusions its graphs are rewritten by.
    """
    fusions = find_backend(backend).fusions
    if isinstance(source, Plan) and not overrides and sequence is None:
        if source.fusions == fusions:
            return source
        return lower(load(source), source.workload, fusions)
    loaded = load(source, overrides)
    length = loaded.spec.model.length(sequence)
    return lower(loaded, Workload(batch, length), fusions)


def estimate(source: Source, overrides: Overrides = (), **workload: Any) -> Any:
    """Parameters, FLOPs and memory of a spec, read off the graph that is emitted.

    With another backend than eager, the estimate for eager is beside it.
    """
    from moegen.estimator import estimate as of_plan

    for what, key, known in (("GPU", "gpu", GPUS), ("optimizer", "optimizer", OPTIMIZERS)):
        if workload.get(key) is not None:
            choose(what, workload[key], known)
    planned = {k: workload.pop(k) for k in ("batch", "sequence", "backend") if k in workload}
    made = of_plan(plan(source, overrides, **planned), **workload)
    name = planned.pop("backend", "eager")
    if name == "eager":
        return made
    beside = of_plan(plan(source, overrides, **planned), **workload)
    return replace(made, backend=name, beside=beside)


def build(
    source: Source,
    out: str | os.PathLike[str] | None = None,
    overrides: Overrides = (),
    *,
    backend: str = "eager",
    force: bool = False,
) -> Path:
    """Write a spec's model as a package of Python files; the folder it is in.

    First proves, on symbols, that the code holds for any batch and sequence.
    out: the folder; `generated/NAME` below the current one unless given.
    """
    planned = plan(source, overrides, backend=backend)
    prove_sizes(load(planned), planned.fusions)
    made = package(planned, find_backend(backend))
    folder = Path(out) if out is not None else Path("generated") / identifier(made.name)
    write(made, folder, force=force)
    return folder


def check(folder: str | os.PathLike[str]) -> list[str]:
    """What in a package differs from what its own spec.yaml gives; nothing if it is faithful."""
    return differences(Path(folder), _again)


def tune(
    folder: str | os.PathLike[str], tokens: Sequence[int] = (1024,), progress: Any = None
) -> str:
    """Measure what suits this machine best for a package, and write it there; says what it did.

    progress: a bar of rich that is advanced, or None.
    """
    place = Path(folder)
    name = backend_of(place)
    chosen = find_backend(name)
    if chosen.tune is None:
        hint = "moegen build -b triton makes a package with kernels"
        raise BackendError(Problem(f"the {name} backend has nothing to tune", hint=hint))
    try:
        return chosen.tune(plan(place / "spec.yaml", backend=name), place, tokens, progress)
    except RuntimeError as error:
        raise BackendError(str(error)) from error


def _again(spec: Path, backend: str) -> Package:
    return package(plan(spec, backend=backend), find_backend(backend))


def module(source: Source, overrides: Overrides = (), *, backend: str = "eager") -> ModuleType:
    """Import a spec's model without keeping its files: the package that `build` would write."""
    made = package(plan(source, overrides, backend=backend), find_backend(backend))
    place = tempfile.mkdtemp(prefix="moegen-")
    # Tracebacks, torch.compile and Triton read the source as long as the process lives.
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    folder = Path(place) / identifier(made.name)
    write(made, folder, force=False)
    return import_package(folder)


def import_package(folder: Path) -> ModuleType:
    """Import a package from a folder that is not on Python's path, under a name of its own."""
    name = f"moegen_generated_{abs(hash(str(folder.resolve()))):x}_{folder.name}"
    place = folder / "__init__.py"
    found = importlib.util.spec_from_file_location(name, place)
    if found is None or found.loader is None or not place.is_file():
        raise PackageError(f"{folder} is not a package; `moegen build` makes one")
    made = importlib.util.module_from_spec(found)
    sys.modules[name] = made
    found.loader.exec_module(made)
    return made


def _strings(overrides: Overrides) -> list[str]:
    if isinstance(overrides, Mapping):
        return [f"{path}={_flow(value)}" for path, value in overrides.items()]
    return list(overrides)


def _flow(value: Any) -> str:
    """A Python value as YAML on one line."""
    import json

    return json.dumps(value)
