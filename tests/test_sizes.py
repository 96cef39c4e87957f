"""No size of a batch is baked into a program; one that is gets found, with its line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

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

        def scores(self, b: Any, logits: Any) -> Any:
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

        def scores(self, b: Any, logits: Any) -> Any:
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

        def scores(self, b: Any, logits: Any) -> Any:
            return logits + torch.zeros(8)

    with pytest.raises(PlanError, match="make it from values of the graph"):
        moegen.plan(with_affinity("constant"), sequence=4)


@pytest.mark.usefixtures("parts")
def test_a_branch_on_a_value_is_told_at_the_line_of_the_spec() -> None:
    class Branching(Affinity):
        """Asks a value that is not there yet."""

        kind: Literal["branching"] = "branching"

        def scores(self, b: Any, logits: Any) -> Any:
            if logits.max() > 0:
                return logits.sigmoid()
            return logits

    with pytest.raises(PlanError, match=r"test_sizes\.py") as caught:
        moegen.plan(with_affinity("branching"), sequence=4)
    assert "affinity: branching" in str(caught.value)
