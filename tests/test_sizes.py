"""No size of a batch is baked into a program; one that is gets found, with its line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tiny_specs import SPECS, moe, spec

import moegen
from moegen.api import load
from moegen.arch.routing.affinity import Affinity
from moegen.errors import PlanError
from moegen.passes.sizes import BATCH, SEQUENCE, prove_sizes


@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_part_of_the_language_is_general(name: str) -> None:
    prove_sizes(load(SPECS[name]))


@pytest.fixture
def parts() -> Iterator[None]:
    """Members that a test adds to a family go when it ends."""
    before = dict(Affinity.members)
    yield
    Affinity.members.clear()
    Affinity.members.update(before)


def with_affinity(kind: str) -> dict[str, Any]:
    return spec("odd", {"layers": 1, "moe": moe(router={"select": 2, "affinity": kind})})


@pytest.mark.usefixtures("parts")
def test_a_size_that_is_baked_in_is_found() -> None:
    class Baked(Affinity):
        """Right for 2 x 12 tokens and for nothing else."""

        kind: Literal["baked"] = "baked"

        def scores(self, b: Any, logits: Any, site: Any) -> Any:
            return logits.view(BATCH * SEQUENCE, 8).softmax(-1)

    # The size fits what the symbols stand for, so that only the equation tells on it.
    with pytest.raises(PlanError, match="size of a batch is baked in") as caught:
        prove_sizes(load(with_affinity("baked")))
    problem = caught.value.problems[0]
    assert problem.path == ("model", "moe", "router", "affinity")
    assert problem.mark is not None
    assert "affinity: baked" in problem.mark.text
    assert "test_sizes.py" in (problem.note or "")


@pytest.mark.usefixtures("parts")
def test_a_wrong_shape_is_told_at_the_line_of_the_spec() -> None:
    class Wrong(Affinity):
        """Views that cannot be."""

        kind: Literal["wrong"] = "wrong"

        def scores(self, b: Any, logits: Any, site: Any) -> Any:
            grouped = logits.view(-1, 7)
            return grouped.softmax(-1)

    with pytest.raises(PlanError) as caught:
        moegen.plan(with_affinity("wrong"), sequence=4)
    text = str(caught.value)
    assert "affinity: wrong" in text
    assert "grouped = view" in text
    assert "traced at" in text


@pytest.mark.usefixtures("parts")
def test_a_constant_of_fixed_size_is_refused() -> None:
    class Constant(Affinity):
        """Adds a tensor that is no value of the graph."""

        kind: Literal["constant"] = "constant"

        def scores(self, b: Any, logits: Any, site: Any) -> Any:
            return logits + torch.zeros(8)

    with pytest.raises(PlanError, match="make it from values of the graph"):
        moegen.plan(with_affinity("constant"), sequence=4)


BY_VALUE: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "branch": ("may branch on its fields", lambda x: x.sigmoid() if x.max() > 0 else x),
    "branch on a size": ("may branch on its fields", lambda x: x if x.shape[0] == 24 else 2 * x),
    "branch on a format": ("may branch on its fields", lambda x: x if x.dtype == DTYPE else 2 * x),
    "int": ("may branch on its fields", lambda x: x.view(int(x.shape[0]), -1)),
    "float": ("may branch on its fields", lambda x: x * float(x.max())),
    "len": ("may branch on its fields", lambda x: x.view(len(x), -1)),
    "loop": ("may branch on its fields", lambda x: sum(x[i] for i in range(x.shape[0]))),
    "iterate": ("cannot be iterated", lambda x: torch.stack([row * 2 for row in x])),
    "membership": ("cannot be iterated", lambda x: x if 3 in x else 2 * x),
    "number from": ("depends on values", lambda x: x * x.max().item()),
    "nonzero": ("depends on values", lambda x: x.nonzero()),
    "mask": ("depends on values", lambda x: x[x > 0]),
    "numpy": ("array", np.exp),
    "missing key": ("no such thing", lambda x: {}["no such thing"]),
}
DTYPE = torch.float32


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("case", BY_VALUE)
def test_what_needs_values_is_told_at_the_lines_of_spec_and_source(case: str) -> None:
    sentence, function = BY_VALUE[case]

    class ByValue(Affinity):
        """Asks a value that is not there yet."""

        kind: Literal["by_value"] = "by_value"

        def scores(self, b: Any, logits: Any, site: Any) -> Any:
            return function(logits)

    with pytest.raises(PlanError, match=sentence) as caught:
        moegen.plan(with_affinity("by_value"), sequence=4)
    (problem,) = caught.value.problems
    assert problem.path == ("model", "moe", "router", "affinity")
    assert problem.mark is not None
    assert "affinity: by_value" in problem.mark.text
    assert "test_sizes.py" in (problem.note or "")


@pytest.mark.usefixtures("parts")
def test_what_works_in_place_is_told_with_the_line_of_the_source() -> None:
    class InPlace(Affinity):
        """Writes over what others may read."""

        kind: Literal["in_place"] = "in_place"

        def scores(self, b: Any, logits: Any, site: Any) -> Any:
            return logits.sigmoid_()

    with pytest.raises(AssertionError, match=r"works in place \(traced at .*test_sizes\.py"):
        moegen.plan(with_affinity("in_place"), sequence=4)
