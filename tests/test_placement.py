"""Placement: every published rule, by the layers of emitted models that are routed."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import imported
from tiny_specs import moe, spec

import moegen
from moegen.arch.placement import Placement
from moegen.errors import SpecError

# Case moe-layer-placement: its name of a list, the depth, our placement, the list.
RULES: dict[str, tuple[int, Any, list[int]]] = {
    "every2_plus1_L12": (12, {"every": 2, "offset": 1}, [1, 3, 5, 7, 9, 11]),
    "every4_plus1_L12": (12, {"every": 4, "offset": 3}, [3, 7, 11]),
    "every6_plus1_L24_openmoe8b": (24, {"every": 6, "offset": 5}, [5, 11, 17, 23]),
    "every4_plus1_L32_openmoe34b": (
        32,
        {"every": 4, "offset": 3},
        [3, 7, 11, 15, 19, 23, 27, 31],
    ),
    "switch_hf_L12_6sparse": (12, {"every": 2, "offset": 1}, [1, 3, 5, 7, 9, 11]),
    "switch_hf_L12_3sparse": (12, {"every": 4, "offset": 1}, [1, 5, 9]),
    "flaxformer_mixed_L12_3": (12, {"every": 4, "offset": 3}, [3, 7, 11]),
    "flaxformer_bottom_L12_3": (12, {"first": 3}, [0, 1, 2]),
    "flaxformer_top_L12_3": (12, {"last": 3}, [9, 10, 11]),
    "flaxformer_middle_L12_4": (12, {"middle": 4}, [4, 5, 6, 7]),
    "glam_L8": (8, {"every": 2}, [0, 2, 4, 6]),
    "vmoe_every2_L12": (12, {"every": 2, "offset": 1}, [1, 3, 5, 7, 9, 11]),
    "vmoe_last2_L8": (8, {"every": 2, "offset": 1, "last": 2}, [5, 7]),
    "vmoe_last2_L12": (12, {"every": 2, "offset": 1, "last": 2}, [9, 11]),
    "gmoe_L12": (12, {"every": 2, "last": 2}, [8, 10]),
    "deepseek_v2_L6": (6, {"first_dense": 1}, [1, 2, 3, 4, 5]),
    "deepseek_v3_L6": (6, {"first_dense": 3}, [3, 4, 5]),
    "mixtral_L4": (4, "all", [0, 1, 2, 3]),
    "softmoe_second_half_L12": (12, {"last": "half"}, [6, 7, 8, 9, 10, 11]),
}
INSERTED = {
    "base_L24_n1_insert": (24, {"insert": 1}, [12]),
    "base_L24_n3_insert": (24, {"insert": 3}, [6, 12, 18]),
}


def source(depth: int, placement: Any) -> dict[str, Any]:
    return spec("placed", {"layers": depth, "moe": moe(placement=placement)})


@pytest.mark.parametrize("name", RULES)
def test_every_published_rule_chooses_its_layers(name: str) -> None:
    depth, placement, wanted = RULES[name]
    layers = imported(source(depth, placement)).Model().layers
    assert [i for i, layer in enumerate(layers) if hasattr(layer, "moe")] == wanted
    assert [i for i, layer in enumerate(layers) if not hasattr(layer, "ffn")] == wanted
    assert len(layers) == depth


@pytest.mark.parametrize("name", INSERTED)
def test_extra_layers_stand_at_even_distances(name: str) -> None:
    depth, given, wanted = INSERTED[name]
    placement = Placement.model_validate(given)
    assert list(placement.inserted(depth)) == wanted
    assert placement.of(depth) == ()
    layers = imported(source(depth, given)).Model().layers
    assert [i for i, layer in enumerate(layers) if hasattr(layer, "moe")] == wanted
    assert [i for i, layer in enumerate(layers) if not hasattr(layer, "attention")] == wanted
    assert len(layers) == depth + len(wanted)


@pytest.mark.parametrize("depth", range(1, 30))
def test_places_of_extra_layers_are_their_final_ones(depth: int) -> None:
    for n in range(1, depth + 1):
        places = Placement(insert=n).inserted(depth)
        assert list(places) == sorted(set(places))
        assert len(places) == n
        assert max(places) < depth + n
    assert Placement().inserted(depth) == ()


@pytest.mark.parametrize(
    ("depth", "placement", "wanted"),
    [
        (12, {"middle": 3}, (5, 6, 7)),  # flaxformer: L - n <= 2 i < L + n
        (11, {"middle": 4}, (4, 5, 6, 7)),
        (11, {"last": "half"}, (5, 6, 7, 8, 9, 10)),
        (1, {"last": "half"}, (0,)),
        (12, {"every": 2, "offset": 1, "last": "half"}, (7, 9, 11)),
        (12, {"first_dense": 2, "every": 3, "first": 2}, (3, 6)),
        (12, {"last_dense": 2, "last": 3}, (7, 8, 9)),
        (12, {"first_dense": 1, "last_dense": 1, "middle": 2}, (5, 6)),
        (12, {"layers": [7, 3]}, (3, 7)),
        (2, {"middle": 2}, (0, 1)),
    ],
)
def test_counts_are_of_the_layers_between_the_ends_that_the_stride_meets(
    depth: int, placement: dict[str, Any], wanted: tuple[int, ...]
) -> None:
    assert Placement.model_validate(placement).of(depth) == wanted


def test_an_override_of_some_layers_may_stand_beside_a_list() -> None:
    listed = moe(placement={"layers": [1, 3]}, overrides=[{"layers": [3], "experts": {"count": 4}}])
    layers = imported(spec("placed", {"layers": 4, "moe": listed})).Model().layers
    assert [len(layer.moe.router) for layer in layers if hasattr(layer, "moe")] == [8, 4]


@pytest.mark.parametrize(
    ("placement", "field", "sentence"),
    [
        ({"every": 2, "offset": 2}, "offset", "offset is 2 but must be below every, 2"),
        ({"first": 1, "last": 1}, "last", "only one of first, middle or last can be said"),
        ({"middle": 1, "last": "half"}, "last", "and middle is"),
        ({"layers": [1], "every": 2}, "every", "layers lists the layers already, so every has no"),
        ({"layers": [1], "insert": 2}, "insert", "layers lists the layers already, so insert"),
        ({"layers": [1, 1]}, "layers", "a layer is listed twice"),
        ({"layers": [-1]}, "layers.0", "layers are counted from 0, so not -1"),
        ({"layers": [4]}, "layers.0", "layer 4 is outside the model: the last is 3"),
        ({"insert": 1, "first_dense": 1}, "first_dense", "so first_dense has no say"),
        ({"insert": 5}, "insert", "insert is 5 but the model has 4 layers"),
        ({"last": 5}, "last", "last is 5 but the model has 4 layers"),
        ({"every": 2, "last": 3}, "last", "last is 3 but the layers to take from are 2"),
        (
            {"first_dense": 3, "middle": 2},
            "middle",
            "middle is 2 but the layers to take from are 1",
        ),
        ({"first_dense": 5}, "first_dense", "first_dense is 5 but the model has 4 layers"),
        ({"first_dense": 2, "last_dense": 2}, "", "no layer of the 4 is chosen"),
        ({"every": 9, "offset": 8}, "", "no layer of the 4 is chosen"),
        ({"last": "third"}, "last", "a whole number of at least 1, null or 'half', not 'third'"),
    ],
)
def test_what_cannot_be_is_refused_at_its_field(
    placement: dict[str, Any], field: str, sentence: str
) -> None:
    with pytest.raises(SpecError) as caught:
        moegen.load(source(4, placement))
    (problem,) = caught.value.problems
    place = ("model", "moe", "placement", *(field.split(".") if field else ()))
    assert tuple(map(str, problem.path)) == place
    assert sentence in problem.message


def test_windows_are_on_layers_that_are_there() -> None:
    window = {"size": 4, "placement": {"insert": 1}}
    with pytest.raises(SpecError) as caught:
        moegen.load(spec("placed", {"attention": {"heads": 4, "window": window}}))
    (problem,) = caught.value.problems
    assert problem.path == ("model", "attention", "window", "placement", "insert")
    assert problem.message == "insert adds routed layers, not windows"
