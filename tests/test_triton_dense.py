"""Gated activations of dense networks: against float64, and under torch's own checkers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from triton_errors import pulled, ratios

from moegen.ops import activations
from moegen_triton.kernels import dense

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "swiglu": (dense.swiglu, activations.swiglu),
    "geglu": (dense.geglu, activations.geglu),
    "geglu tanh": (
        partial(dense.geglu, approximate="tanh"),
        partial(activations.geglu, approximate="tanh"),
    ),
    "reglu": (dense.reglu, activations.reglu),
    "clamped": (
        partial(dense.clamped_swiglu, limit=1.5, alpha=1.702),
        partial(activations.clamped_swiglu, limit=1.5, alpha=1.702),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_near_to_float64(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ours, plain = CASES[name]
    for shape in ((3, 5, 40), (7, 1100), (2, 33), (9,), (0, 8), (4, 0)):
        gate, up, slope = (2 * torch.randn(3, *shape)).to(dtype).unbind()
        assert max(ratios(ours, plain, gate, up, slopes=[slope])) <= 2


@pytest.mark.parametrize("name", CASES)
def test_halves_are_read_where_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    ours, plain = CASES[name]
    both = torch.randn(2, 3, 48)
    gate, up = both.chunk(2, -1)
    slope = torch.randn(2, 24, 3).transpose(1, 2)  # has to be copied, but halves do not
    want = pulled(plain, gate, up, slopes=[slope])
    seen: list[int] = []
    rows = dense._rows

    def watched(x: Tensor) -> Tensor:
        found = rows(x)
        seen.append(int(found.data_ptr() == x.data_ptr()))
        return found

    monkeypatch.setattr(dense, "_rows", watched)
    for got, like in zip(pulled(ours, gate, up, slopes=[slope]), want, strict=True):
        torch.testing.assert_close(got, like)
    assert seen[:2] == [1, 1]
    assert seen[-2:] == [1, 1]


def test_other_layouts() -> None:
    torch.manual_seed(2)
    tall = torch.randn(2, 24, 6)
    for gate, up in (
        (tall[0].t(), tall[1].t()),
        (tall[0, ::2, ::3], tall[1, ::2, ::3]),
        (torch.randn(24).expand(6, 24), tall[0].t()),
        (torch.tensor(0.3), torch.tensor(2.0)),
    ):
        got, want = dense.swiglu(gate, up), activations.swiglu(gate, up)
        torch.testing.assert_close(got, want)


def test_nan_stays_where_it_is() -> None:
    gate, up = torch.ones(2, 4, 8)
    gate[1, 2], up[3, 4] = float("nan"), float("nan")
    for ours, _ in CASES.values():
        found = pulled(ours, gate, up, slopes=[torch.ones(4, 8)])
        assert torch.isnan(found[0]).nonzero().tolist() == [[1, 2], [3, 4]]
        for grad in found[1:]:
            assert not torch.isnan(grad[[0, 2]]).any()


def test_keeps_its_inputs_alone() -> None:
    gate, up = torch.randn(2, 4, 8).unbind()
    gate.requires_grad_()
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        dense.swiglu(gate, up)
    assert sorted(kept) == sorted([gate.data_ptr(), up.data_ptr()])


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(TypeError, match="float64"):
        dense.swiglu(torch.ones(2).double(), torch.ones(2).double())
    with pytest.raises(ValueError, match=r"one shape and format.*\[2\].*\[3\]"):
        dense.reglu(torch.ones(2), torch.ones(3))


def test_ops_are_sound_and_compile_whole() -> None:
    both = torch.randn(2, 4, 16, requires_grad=True)
    gate, up = (x.requires_grad_() for x in both.detach().chunk(2, -1))
    torch.library.opcheck(dense._gated, (gate, up, "clamped_swiglu", 7.0, 1.702))

    def layer(x: Tensor) -> Tensor:
        return dense.swiglu(*x.chunk(2, -1)) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    slope = torch.randn(2, 4, 8)
    got, want = (pulled(f, both, slopes=[slope]) for f in (compiled, layer))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
