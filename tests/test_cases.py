"""Compositions that the language of routing refuses, each a file of tests/cases.

The comments that a file begins with are all that is said of it: `line:column: message`.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

import moegen
from moegen.arch import (
    capacity,
    encoder_decoder,
    experts,
    mixture_rules,
    multitask,
    patches,
    positions,
    recurrence,
    recurrent,
    spec,
    train,
    two_tower,
    vision,
)
from moegen.arch.losses import auxiliary, balance, entropy, importance
from moegen.arch.mixture import experts as vector_experts
from moegen.arch.mixture import gating
from moegen.arch.mixture import layer as mixture_layer
from moegen.arch.mixture import model as mixture_model
from moegen.arch.routing import (
    expert_choice,
    gate,
    noise,
    restrict,
    router,
    router_rules,
    score,
    second,
    token_choice,
)
from moegen.errors import SpecError

CASES = sorted((Path(__file__).parent / "cases").glob("*.yaml"))
RULES = ("rules", "check", "_side", "_broken_stacks", "_broken", "_unknown_losses", "broken_loss")
ALL_OF = (mixture_rules, router_rules)  # but for what they warn of
MODULES = (
    *(vector_experts, gating, mixture_layer, mixture_model, multitask),
    *(encoder_decoder, positions, patches, two_tower, vision),
    *(capacity, experts, auxiliary, balance, entropy, importance, expert_choice, gate, noise),
    *(recurrence, recurrent),
    *(restrict, router, score, second, spec, token_choice, train, *ALL_OF),
)


def refused(file: Path) -> list[str]:
    """What is said of a file, in order of lines."""
    with pytest.raises(SpecError) as caught:
        moegen.load(file)
    problems = [(p.mark, p.message) for p in caught.value.problems]
    assert all(mark is not None and mark.file == str(file) for mark, _ in problems)
    told = {(mark.line, mark.column, message) for mark, message in problems if mark}
    return [f"{line}:{column}: {message}" for line, column, message in sorted(told)]


@pytest.mark.parametrize("file", CASES, ids=lambda file: file.stem)
def test_what_is_said_of_a_case(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    expected = [line.removeprefix("# ") for line in takewhile(lambda x: x.startswith("#"), lines)]
    assert expected
    assert refused(file) == expected


def rule_lines(module: ModuleType) -> Iterator[tuple[str, int]]:
    """Where rules of a module yield a sentence: file and line."""
    tree = ast.parse(inspect.getsource(module))
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or function.name == "leaks":
            continue
        if function.name in RULES or module in ALL_OF:
            for node in ast.walk(function):
                if isinstance(node, ast.Yield):
                    yield str(module.__file__), node.lineno


def test_every_rule_of_the_language_has_a_case() -> None:
    wanted = {place for module in MODULES for place in rule_lines(module)}
    assert len(wanted) > 80
    files = {file for file, _ in wanted}
    met: set[tuple[str, int]] = set()

    def note(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            met.add((frame.f_code.co_filename, frame.f_lineno))
        return note

    before = sys.gettrace()
    sys.settrace(note)
    try:
        for file in CASES:
            refused(file)
    finally:
        sys.settrace(before)
    left = sorted(f"{Path(file).name}:{line}" for file, line in wanted - met)
    assert left == []
