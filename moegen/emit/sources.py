"""Extracts the source of the ops that a model uses, with all they need and nothing else."""

from __future__ import annotations

import ast
import builtins
import functools
import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moegen.errors import PackageError, Problem
from moegen.ops.op import OPS

DOORS = '"""The operations of this model: its kernels, and plain PyTorch for the rest."""'
DOORS_ALONE = '"""The operations of this model, all of them kernels."""'
HEAD = '"""The operations of this model: plain PyTorch, one function each."""'


@dataclass(frozen=True)
class Module:
    """A module of ops, cut into its top-level statements."""

    name: str
    imports: tuple[tuple[str, str], ...]  # (name that it binds, line of source)
    statements: tuple[tuple[frozenset[str], frozenset[str], str], ...]  # (defines, uses, source)


def ops_module(names: set[str], doors: Mapping[str, str] | None = None) -> str:
    """The text of a module that defines the named ops and needs torch only.

    doors: ops that the module takes from another one of the package instead, by its name.
    """
    doors = {n: m for n, m in (doors or {}).items() if n in names}
    names = names - doors.keys()
    wanted = {(OPS[name].reference.__module__, name) for name in names}
    kept: dict[str, set[int]] = {}
    imports: set[str] = set()
    todo = sorted(wanted)
    seen: set[tuple[str, str]] = set()
    while todo:
        module_name, name = todo.pop()
        if (module_name, name) in seen:
            continue
        seen.add((module_name, name))
        module = _module(module_name)
        own = any(name in defines for defines, _, _ in module.statements)
        for index, (defines, uses, _) in enumerate(module.statements):
            # A statement that defines nothing (a registration) comes with what it registers.
            if name in defines or (own and not defines and name in uses):
                kept.setdefault(module_name, set()).add(index)
                todo += [(module_name, use) for use in sorted(uses | defines)]
        for bound, line in module.imports:
            if bound == name:
                origin = _from_ours(line)
                if origin:
                    todo.append((origin, name))
                else:
                    imports.add(line)
    _refuse_clash(kept)
    texts = [_module(m).statements[i][2] for m in sorted(kept) for i in sorted(kept[m])]
    return _join(sorted(imports), _doors(doors, names), texts)


def _doors(doors: Mapping[str, str], own: set[str]) -> list[str]:
    """Imports from other modules of the package, in isort's order, and what all of this is for."""
    if not doors:
        return []
    modules: dict[str, list[str]] = {}
    for name, module in doors.items():
        modules.setdefault(module, []).append(name)
    lines = [f"from {m} import {', '.join(sorted(modules[m]))}" for m in sorted(modules)]
    names = [f'    "{name}",' for name in sorted({*doors, *own})]
    return [*lines, "", "__all__ = [", *names, "]"]


def _refuse_clash(kept: dict[str, set[int]]) -> None:
    """All that is kept stands in one file, so no two modules may define one name."""
    origin: dict[str, str] = {}
    for module, indices in sorted(kept.items()):
        for name in frozenset().union(*(_module(module).statements[i][0] for i in indices)):
            if origin.setdefault(name, module) != module:
                sentence = f"ops of {origin[name]} and {module} both use a {name!r} of their own"
                raise PackageError(Problem(sentence, hint="rename one of them"))


def _join(imports: list[str], doors: list[str], texts: list[str]) -> str:
    standard = _merged(line for line in imports if not _is_torch(line))
    torch_lines = _merged(line for line in imports if _is_torch(line))
    blocks = ["\n".join(lines) for lines in (standard, torch_lines, doors) if lines]
    head = HEAD if not doors else DOORS if texts else DOORS_ALONE
    out = "\n\n".join([head, "from __future__ import annotations", *blocks])
    before = "imports"
    for text in texts:
        block = text.startswith(("def ", "class ", "@", "#")) or "\n" in text
        kind = "block" if block else "single"
        gap = {("imports", "single"): 2, ("single", "single"): 1}.get((before, kind), 3)
        out += "\n" * gap + text
        before = kind
    return out + "\n"


def _merged(lines: Iterable[str]) -> list[str]:
    """Import lines in the order of isort: plain ones first, names of one module together."""
    plain: list[str] = []
    names: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("import "):
            plain.append(line)
        else:
            _, module, _, name = line.split(" ", 3)
            names.setdefault(module, []).append(name)
    order = {
        m: sorted(n, key=lambda x: (not x.isupper(), not x[0].isupper(), x))
        for m, n in names.items()
    }
    return [*sorted(plain), *(f"from {m} import {', '.join(order[m])}" for m in sorted(order))]


def _is_torch(line: str) -> bool:
    return line.split()[1].split(".")[0] == "torch"


def _from_ours(line: str) -> str | None:
    """The module of ours that an import line takes a name from, or None."""
    words = line.split()
    return words[1] if words[0] == "from" and words[1].startswith("moegen.") else None


@functools.lru_cache(maxsize=64)
def _module(name: str) -> Module:
    try:
        source = inspect.getsource(importlib.import_module(name))
    except (OSError, TypeError):
        sentence = f"ops of {name} cannot be emitted, because their source is not in a file"
        raise PackageError(Problem(sentence, hint="define them in a module or a script")) from None
    tree = ast.parse(source)
    imports: list[tuple[str, str]] = []
    statements = []
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports += _bound(node)
        elif _defines(node) or _registers(node):
            statements.append((_defines(node), _uses(node), _text(node, source)))
    return Module(name, tuple(imports), tuple(statements))


def _bound(node: ast.Import | ast.ImportFrom) -> list[tuple[str, str]]:
    out = []
    for alias in node.names:
        renamed = f" as {alias.asname}" if alias.asname else ""
        bound = alias.asname or alias.name.split(".")[0]
        if isinstance(node, ast.ImportFrom):
            out.append((bound, f"from {node.module} import {alias.name}{renamed}"))
        else:
            out.append((bound, f"import {alias.name}{renamed}"))
    return out


def _defines(node: ast.stmt) -> frozenset[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        registered = any(_root(d) not in ("op", "functools") for d in node.decorator_list)
        return frozenset() if registered and node.name == "_" else frozenset({node.name})
    if isinstance(node, ast.Assign):
        targets = [t for target in node.targets for t in ast.walk(target)]
        names = (t for t in targets if isinstance(t, ast.Name))
        return frozenset(t.id for t in names if isinstance(t.ctx, ast.Store))
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return frozenset({node.target.id})
    return frozenset()


def _registers(node: ast.stmt) -> bool:
    """Whether a statement tells torch more of an op, as `@kernel.register_fake def _` does."""
    if isinstance(node, ast.FunctionDef):
        return True
    call = node.value if isinstance(node, ast.Expr) else None
    what = call.func if isinstance(call, ast.Call) else None
    return isinstance(what, ast.Attribute) and what.attr.startswith("register")


def _root(node: ast.expr) -> str:
    while isinstance(node, (ast.Call, ast.Attribute)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _uses(node: ast.stmt) -> frozenset[str]:
    """Names that a statement reads, those of the op's own cost aside."""
    names = set()
    for child in ast.walk(_undecorated(node)):
        if isinstance(child, ast.Name) and not hasattr(builtins, child.id):
            names.add(child.id)
    return frozenset(names)


def _undecorated(node: ast.stmt) -> ast.stmt:
    if not isinstance(node, ast.FunctionDef):
        return node
    kept = [d for d in node.decorator_list if _root(d) != "op"]
    copy = ast.FunctionDef(**{**dict(ast.iter_fields(node)), "decorator_list": kept})
    return ast.copy_location(copy, node)


def _text(node: ast.stmt, source: str) -> str:
    """The statement as written, without `@op(...)`, with the comment right above it."""
    lines = source.splitlines()
    decorators = getattr(node, "decorator_list", [])
    kept = [d for d in decorators if _root(d) != "op"]
    first = min([node.lineno, *(d.lineno for d in kept)])
    top = min([node.lineno, *(d.lineno for d in decorators)]) - 1
    start = top
    while start and lines[start - 1].startswith("#"):
        start -= 1
    comment = lines[start:top]
    return "\n".join([*comment, *lines[first - 1 : node.end_lineno]])
