"""The builder: plain torch on proxies becomes a graph in the author's own words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import planned
from torch import fx

from moegen.arch.init import ZEROS
from moegen.graph import meta
from moegen.graph.builder import Builder, Trace
from moegen.graph.component import Component
from moegen.graph.execute import Executable
from moegen.graph.fault import Fault
from moegen.graph.layer import Layer
from moegen.graph.verify import verify


def traced(element: Layer) -> Component:
    component = Trace(planned("dense").spec).component(element, ("model",), "other")
    verify(component)
    return component


def names(component: Component) -> list[str | None]:
    """What every call of the forward pass is called, in order."""
    nodes = component.programs["forward"].graph.nodes
    return [meta.name(n) for n in nodes if n.op in ("call_function", "call_method")]


def calls(component: Component) -> list[fx.Node]:
    nodes = component.programs["forward"].graph.nodes
    return [n for n in nodes if n.op in ("call_function", "call_method")]


class Assigned(Layer):
    def forward(self, b: Builder, x: Any) -> Any:
        first = x + 1
        second = torch.relu(first) * 2
        return second


def test_the_whole_of_an_expression_has_the_name_and_its_inside_has_none() -> None:
    assert names(traced(Assigned())) == ["first", None, "second"]


class Unpacked(Layer):
    def forward(self, b: Builder, x: Any) -> Any:
        left, right = x.chunk(2, -1)
        low, high = right + 1, right - 1
        return left * low * high


def test_parts_are_called_what_they_are_unpacked_into() -> None:
    component = traced(Unpacked())
    assert names(component) == [None, "left", "right", "low", "high", None, None]
    assert [n for n in calls(component) if meta.PART in n.meta] == calls(component)[1:3]


class Helped(Layer):
    def forward(self, b: Builder, x: Any) -> Any:
        turned = self.twice(x)
        a, z = self.both(turned)
        return a @ z

    def twice(self, x: Any) -> Any:
        inner = x * 2
        return inner.transpose(0, 1)

    def both(self, x: Any) -> Any:
        return x.relu(), x.sigmoid()


def test_what_a_helper_returns_is_called_what_its_caller_calls_it() -> None:
    assert names(traced(Helped())) == ["inner", "turned", "a", "z", None]


class Part(Layer):
    def apply(self, b: Builder, x: Any) -> Any:
        weight = b.param("weight", 4, 4)
        return F.linear(x, weight)

    def given(self, b: Builder, x: Any) -> Any:
        return x


class Whole(Layer):
    def forward(self, b: Builder, x: Any) -> Any:
        with b.section("mixing"):
            mixed = b.inline(Part(), "apply", x, path=("ffn",))
        same = b.inline(Part(), "given", mixed, path=("norm",))
        return same + x


def test_a_part_is_traced_in_place_under_its_own_path_and_its_owners_names() -> None:
    component = traced(Whole())
    linear, added = calls(component)
    assert (meta.name(linear), meta.section(linear)) == ("mixed", "mixing")
    assert meta.origin(linear).path == ("model", "ffn")
    assert "test_builder.py" in meta.origin(linear).traced_at
    assert meta.section(added) is None
    assert meta.origin(added).path == ("model",)
    assert list(component.weights) == ["weight"]


class Recorded(Layer):
    def forward(self, b: Builder, x: Any) -> Any:
        pair = b.record("Pair", one=x + 1, two={"double": x * 2})
        return pair.one - pair.two["double"], pair


def test_records_are_named_tuples_whose_fields_are_read_by_name() -> None:
    run = Executable(traced(Recorded()))
    out, pair = run(torch.tensor([1.0, 5.0]))
    assert out.tolist() == [0.0, -4.0]
    assert type(pair).__name__ == "Pair"
    assert pair._fields == ("one", "two")
    assert pair.two["double"].tolist() == [2.0, 10.0]


class Disagreeing(Layer):
    def forward(self, b: Builder, x: Any) -> Any:
        return b.record("Pair", one=x), b.record("Pair", two=x)


def test_records_of_one_name_have_the_same_fields() -> None:
    with pytest.raises(AssertionError, match="two records called Pair differ"):
        traced(Disagreeing())


class Owner(Layer):
    def forward(self, b: Builder, x: Any) -> Any:
        weight = b.param("weight", 3, 3)
        again = b.param("weight", 3, 3)
        spare = b.buffer("spare", 3, make=torch.zeros, size=(3,))
        return x @ weight @ again + spare


def test_a_parameter_is_read_once_however_often_it_is_asked_for() -> None:
    component = traced(Owner())
    reads = [n.target for n in component.programs["forward"].graph.nodes if n.op == "get_attr"]
    assert reads == ["weight", "spare"]
    assert component.weights["weight"].shape == (3, 3)
    assert component.buffers["spare"].persistent is False


class Torn(Layer):
    def forward(self, b: Builder, x: Any) -> Any:
        return x @ b.param("weight", 3, 3) @ b.param("weight", 3, 3, init=ZEROS)


def test_one_parameter_has_one_shape_and_one_start() -> None:
    with pytest.raises(AssertionError, match="weight"):
        traced(Torn())


class Wasteful(Layer):
    def forward(self, b: Builder, x: Any) -> Any:
        unused = x * b.param("unused", 3)
        _ = unused.exp()
        return x + 1


def test_what_nothing_reads_is_not_in_the_graph() -> None:
    assert len(calls(traced(Wasteful()))) == 1


class Child(Layer):
    scale: float

    def forward(self, b: Builder, x: Any) -> Any:
        return x * self.scale


class Parent(Layer):
    def forward(self, b: Builder, x: Any) -> Any:
        x = b.child("one", Child(scale=2.0), x)
        x = b.child("two", Child(scale=2.0), x)
        return b.child("three", Child(scale=3.0), x)


def test_equal_elements_are_one_component_and_others_another_class() -> None:
    component = traced(Parent())
    one, two, three = component.children.values()
    assert one is two
    assert (one.class_name, three.class_name) == ("Child", "Child2")
    assert Executable(component)(torch.ones(1)).item() == 12.0


class Clash(Layer):
    def forward(self, b: Builder, x: Any) -> Any:
        x = b.child("one", Child(scale=2.0), x)
        return b.child("one", Child(scale=3.0), x)


def test_one_name_is_one_child() -> None:
    with pytest.raises(AssertionError, match="two children called one"):
        traced(Clash())


class Modal(Layer):
    def forward(self, b: Builder, x: Any) -> Any:
        return F.dropout(x, 0.5, b.training)


def test_the_mode_of_the_module_is_a_value_of_the_graph() -> None:
    run = Executable(traced(Modal()))
    x = torch.ones(1000)
    assert torch.equal(run.eval()(x), x)
    assert 300 < int((run.train()(x) == 0).sum()) < 700


class Programs(Layer):
    def programs(self) -> tuple[str, ...]:
        return ("forward", "backwards")

    def forward(self, b: Builder, x: Any) -> Any:
        return x @ b.param("weight", 2, 2)

    def backwards(self, b: Builder, x: Any) -> Any:
        return x @ b.param("weight", 2, 2).T


def test_programs_share_parameters() -> None:
    component = traced(Programs())
    assert list(component.weights) == ["weight"]
    run = Executable(component)
    with torch.no_grad():
        run.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    x = torch.tensor([[1.0, 0.0]])
    assert run(x).tolist() == [[1.0, 2.0]]
    assert run(x, program="backwards").tolist() == [[1.0, 3.0]]


class Empty(Layer):
    pass


def test_a_layer_without_a_forward_pass_says_so() -> None:
    with pytest.raises(Fault, match="Empty has no forward"):
        traced(Empty())
