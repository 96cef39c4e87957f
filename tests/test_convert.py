"""The table language of weights: layouts, alternatives, and what it refuses."""

import pytest
import torch

from moegen.convert import FAMILIES, ConversionError, Family, to_moegen
from moegen.convert.family import maybe
from moegen.convert.layout import Concat, Interleaved, Stack, Transposed

SIZES = (3, 4, 5)


def tensors(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {k.replace("__", "."): torch.randn(v, generator=generator) for k, v in shapes.items()}


def once(ours, theirs):
    return Family("one", model=({ours: theirs},), layer=())


def back_and_forth(family, theirs):
    ours = family.to_moegen(theirs)
    again = family.to_huggingface(ours)
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[k], theirs[k]) for k in theirs)
    return ours


def test_a_name_for_another():
    theirs = tensors(a=SIZES)
    assert back_and_forth(once("x", "a"), theirs)["x"] is theirs["a"]


def test_stack_of_concatenated():
    family = once("x", Stack(Concat("e.{expert}.a", "e.{expert}.b")))
    theirs = tensors(e__0__a=(3, 4), e__0__b=(3, 4), e__1__a=(3, 4), e__1__b=(3, 4))
    x = back_and_forth(family, theirs)["x"]
    assert x.shape == (2, 6, 4)
    assert torch.equal(x[1, 3:], theirs["e.1.b"])


def test_transposed_and_interleaved():
    theirs = tensors(a=(2, 3, 8))
    x = back_and_forth(once("x", Interleaved(Transposed("a"), dim=1)), theirs)["x"]
    assert x.shape == (2, 8, 3)
    assert torch.equal(x[:, 4:], theirs["a"][:, :, 1::2].transpose(1, 2))


def test_one_of_theirs_for_several_of_ours():
    theirs = tensors(qkv=(9, 4))
    ours = back_and_forth(once(Concat("q", "k", "v"), "qkv"), theirs)
    assert torch.equal(ours["k"], theirs["qkv"][3:6])


def test_more_than_ten_experts_keep_their_order():
    theirs = {f"e.{i}.w": torch.full((2,), float(i)) for i in reversed(range(12))}
    x = back_and_forth(once("x", Stack("e.{expert}.w")), theirs)["x"]
    assert x[:, 0].tolist() == list(range(12))


@pytest.mark.parametrize(
    ("source", "given", "message"),
    [
        (Concat("a", "b"), {"a": (3, 4)}, "b is missing"),
        (Concat("a", "b"), {"a": (3, 4), "b": (2, 4)}, "does not fit"),
        (Stack("e.{expert}.w"), {"e__0__w": (3,), "e__2__w": (3,)}, "e.1.w is missing"),
        (Stack("e.{expert}.w"), {"e__0__w": (3,), "e__1__w": (2,)}, "does not fit"),
        (Stack("e.{expert}.w"), {}, "e.0.w is missing"),
        (Stack("e.{expert}.w", like="r"), {"e__0__w": (3,), "r": (2, 3)}, "e.1.w is missing"),
        (Transposed("a"), {"a": (3,)}, "does not fit"),
        (Interleaved("a", dim=0), {"a": (3,)}, "does not fit"),
        ("a", {"a": (3,), "z": (3,)}, "z is left over"),
    ],
)
def test_what_theirs_lack(source, given, message):
    rows = {"x": source, "router": "r"} if "r" in given else {"x": source}
    with pytest.raises(ConversionError, match=message):
        Family("one", model=(rows,), layer=()).to_moegen(tensors(**given))


def test_alternatives_are_chosen_layer_by_layer():
    dense, routed, packed = {"f": "mlp.w"}, {"m": Stack("e.{expert}.w")}, {"m": "packed"}
    family = Family("some", model=(), layer=({"n": "norm"}, (dense, routed, packed)))
    theirs = tensors(
        model__layers__0__norm=(2,),
        model__layers__0__mlp__w=(2,),
        model__layers__1__norm=(2,),
        model__layers__1__e__0__w=(2,),
    )
    ours = back_and_forth(family, theirs)
    assert sorted(ours) == ["layers.0.f", "layers.0.n", "layers.1.m", "layers.1.n"]
    theirs["model.layers.1.packed"] = theirs.pop("model.layers.1.e.0.w").unsqueeze(0)
    assert torch.equal(family.to_moegen(theirs)["layers.1.m"], ours["layers.1.m"])
    del theirs["model.layers.0.norm"], theirs["model.layers.0.mlp.w"]
    with pytest.raises(ConversionError) as error:
        family.to_moegen(theirs)
    assert str(error.value).splitlines() == [
        "error: model.layers.0.norm is missing: the table of some checkpoints needs it",
        "error: model.layers.0.mlp.w is missing: the table of some checkpoints needs it",
    ]


def test_optional_rows_stand_or_fall_together():
    family = Family("one", model=({"x": "a"}, maybe({"y": "b", "z": "c"})), layer=())
    assert sorted(back_and_forth(family, tensors(a=(1,)))) == ["x"]
    assert sorted(back_and_forth(family, tensors(a=(1,), b=(1,), c=(1,)))) == ["x", "y", "z"]
    with pytest.raises(ConversionError, match="b is left over"):
        family.to_moegen(tensors(a=(1,), b=(1,)))


def test_an_unknown_family():
    with pytest.raises(ConversionError, match="no table for 'mixtrel'; did you mean 'mixtral'"):
        to_moegen("mixtrel", {})
    with pytest.raises(
        ConversionError, match=rf"there are deepseek_v2, .*\({len(FAMILIES)} in all\)"
    ):
        to_moegen("rwkv", {})
