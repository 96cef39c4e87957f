"""The FLOP formulas against products counted by hand."""

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import moegen.ops.experts as ops
from moegen.ops.flop_counter import custom_mapping
from moegen.ops.op import OPS


def test_grouped_products_count_forward_and_backward() -> None:
    rows = torch.randn(12, 16, requires_grad=True)
    weight = torch.randn(3, 8, 16, requires_grad=True)
    ends = torch.tensor([2, 5, 12], dtype=torch.int32)
    product = 2 * 12 * 8 * 16
    with FlopCounterMode(display=False, custom_mapping=custom_mapping()) as counter:
        out = ops.grouped_linear(rows, weight, ends)
    assert counter.get_total_flops() == product
    declared = OPS["grouped_linear"].flops
    assert declared is not None
    assert declared(rows, weight, ends) == product
    with FlopCounterMode(display=False, custom_mapping=custom_mapping()) as counter:
        torch.autograd.grad(out.sum(), [rows, weight])
    assert counter.get_total_flops() == 2 * product


def test_torchs_own_grouped_product_counts_the_same() -> None:
    rows, weight = torch.randn(12, 16), torch.randn(3, 8, 16)
    ends = torch.tensor([2, 5, 12], dtype=torch.int32)
    with FlopCounterMode(display=False, custom_mapping=custom_mapping()) as counter:
        out = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
        F.grouped_mm(out.t(), rows, offs=ends)
    assert counter.get_total_flops() == 2 * 2 * 12 * 8 * 16


def test_attention_on_cpu_counts_the_pairs_that_a_causal_mask_leaves() -> None:
    batch, heads, length, width = 2, 4, 10, 8
    query, key, value = (
        torch.randn(batch, heads, length, width, requires_grad=True) for _ in range(3)
    )

    def count(causal: bool, halve: bool) -> int:
        mapping = custom_mapping(halve_causal=halve)
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
            torch.autograd.grad(out.sum(), [query, key, value])
        return int(counter.get_total_flops())

    per_pair = 2 * (2 + 5) * width  # two products forward, five backward
    every, seen = batch * heads * length**2, batch * heads * length * (length + 1) // 2
    assert count(causal=False, halve=True) == per_pair * every
    assert count(causal=True, halve=True) == per_pair * seen
    assert count(causal=True, halve=False) == per_pair * every
