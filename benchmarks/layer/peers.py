"""Other implementations of the layer, imported when they are made; absent ones say why."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.layer.inputs import Batch, Inputs
from benchmarks.layer.shapes import Workload
from benchmarks.layer.variants import Absent, Forward, Variant, module

# transformers' batched_mm copies an expert's matrices for every row, and their gradients too.
MOST_COPIED = 8e9
# Its loop gives every expert a gradient as large as all experts': bytes that this may write.
MOST_LOOPED = 2e12


def _grouped_mm(work: Workload, inputs: Inputs) -> Forward:
    experts = work.experts

    def forward(batch: Batch) -> Tensor:
        tokens, k = batch.experts.shape
        flat = batch.experts.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.zeros(experts, dtype=torch.int32, device=flat.device)
        # bincount would wait for the device
        counts.index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        first = F.grouped_mm(batch.x[order // k], inputs.up.transpose(-2, -1), offs=ends)
        gate, up = first.chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, inputs.down.transpose(-2, -1), offs=ends)
        rows = rows * batch.weights.reshape(-1)[order, None]
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(tokens * k, device=order.device)
        return rows[inverse].view(tokens, k, -1).sum(1)

    return forward


def _transformers(implementation: str) -> Callable[[Workload, Inputs], Forward]:
    def make(work: Workload, inputs: Inputs) -> Forward:
        home = "transformers.models.qwen3_moe"
        config = module(f"{home}.configuration_qwen3_moe").Qwen3MoeConfig(
            hidden_size=work.d,
            moe_intermediate_size=work.n,
            num_experts=work.experts,
            num_experts_per_tok=work.k,
            hidden_act="silu",
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            layer = module(f"{home}.modeling_qwen3_moe").Qwen3MoeExperts(config)
        layer.gate_up_proj, layer.down_proj = inputs.up, inputs.down

        def forward(batch: Batch) -> Tensor:
            out: Tensor = layer(batch.x, batch.experts, batch.weights)
            return out

        return forward

    return make


def _too_many_copies(work: Workload) -> str:
    copied = 2 * 3 * work.rows * work.n * work.d * work.itemsize
    return f"would copy {copied / 1e9:.0f} GB of weights" if copied > MOST_COPIED else ""


def _too_many_zeros(work: Workload) -> str:
    written = 0 if work.decodes else work.experts * work.weight_bytes
    return f"would write {written / 1e12:.1f} TB of zeros" if written > MOST_LOOPED else ""


def _liger(work: Workload, inputs: Inputs) -> Forward:
    apply = module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction.apply

    def forward(batch: Batch) -> Tensor:
        out: Tensor = apply(batch.x, inputs.up, inputs.down, batch.experts32, batch.weights)
        return out

    return forward


def _scattermoe(work: Workload, inputs: Inputs) -> Forward:
    scattermoe = module("scattermoe.parallel_experts")
    linear, sort = scattermoe.parallel_linear, scattermoe.flatten_sort_count

    def forward(batch: Batch) -> Tensor:
        experts, order, ends = sort(batch.experts, work.experts)
        where = (experts, order, ends)
        first = linear(batch.x, inputs.up.permute(0, 2, 1), work.k, *where, grouped_out=True)
        gate, up = first.chunk(2, -1)
        rows, down = F.silu(gate) * up, inputs.down.permute(0, 2, 1)
        out: Tensor = linear(rows, down, 1, *where, grouped_in=True, gates=batch.weights)
        return out

    return forward


def _moe_ops(work: Workload, inputs: Inputs) -> Forward:
    moe_ops = module("moe_ops")
    if not inputs.up.is_cuda:
        raise Absent("moe_ops: its autotuner needs a GPU")

    def forward(batch: Batch) -> Tensor:
        rows, where, ends = moe_ops.permute(batch.x, batch.experts32, E=work.experts)
        gate, up = moe_ops.grouped_gemm(rows, inputs.up, ends, trans_b=True).chunk(2, -1)
        hidden = (F.silu(gate) * up).contiguous()
        rows = moe_ops.grouped_gemm(hidden, inputs.down, ends, trans_b=True)
        tokens, k = batch.experts.shape
        out: Tensor = moe_ops.unpermute(rows, where, batch.weights, num_tokens=tokens, num_topK=k)
        return out

    return forward


def _sonicmoe(work: Workload, inputs: Inputs) -> Forward:
    run = module("sonicmoe.functional").moe_general_routing_inputs
    swiglu = module("sonicmoe.enums").ActivationType.SWIGLU
    if not inputs.up.is_cuda:
        raise Absent("sonicmoe: needs a GPU")
    token = torch.arange(work.tokens, device=inputs.up.device, dtype=torch.int32)
    token = token.repeat_interleave(work.k)  # must ascend

    def forward(batch: Batch) -> Tensor:
        out: Tensor = run(
            *(batch.x, batch.weights.reshape(-1), token, batch.experts32.reshape(-1)),
            *(inputs.up.permute(1, 2, 0), None, inputs.down.permute(1, 2, 0), None),
            E=work.experts,
            stream_id=torch.cuda.current_stream().cuda_stream,
            activation_type=swiglu,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
            concat_layout=True,
        )[0]
        return out

    return forward


GROUPED_MM = Variant("torch grouped_mm", "torch", _grouped_mm)
PEERS = (
    GROUPED_MM,
    Variant("transformers grouped_mm", "transformers", _transformers("grouped_mm")),
    Variant(
        "transformers batched_mm", "transformers", _transformers("batched_mm"), _too_many_copies
    ),
    Variant(
        "transformers eager",
        "transformers",
        _transformers("eager"),
        _too_many_zeros,
        captures=False,
    ),
    Variant("Liger", "Triton", _liger, captures=False),
    Variant("ScatterMoE", "Triton", _scattermoe, captures=False),
    Variant("moe-ops", "Triton", _moe_ops, captures=False),
    Variant("SonicMoE", "CuTe", _sonicmoe, captures=False),
)
