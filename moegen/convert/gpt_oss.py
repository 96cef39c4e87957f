"""gpt-oss (OpenAI 2025, arXiv:2508.10925), with experts in plain numbers, not in MXFP4."""

from moegen.convert.family import Family, Rows, maybe
from moegen.convert.layout import Interleaved, Transposed
from moegen.convert.rows import ATTENTION, EMBEDDING, HEAD, NORMS, QKV_BIAS

SINKS: Rows = {
    "attention.output_bias": "self_attn.o_proj.bias",
    "attention.sinks": "self_attn.sinks",
}
EXPERTS: Rows = {
    "moe.router": "mlp.router.weight",
    "moe.router_bias": "mlp.router.bias",
    "moe.gate_up": Interleaved(Transposed("mlp.experts.gate_up_proj"), dim=1),
    "moe.gate_up_bias": Interleaved("mlp.experts.gate_up_proj_bias", dim=1),
    "moe.down": Transposed("mlp.experts.down_proj"),
    "moe.down_bias": "mlp.experts.down_proj_bias",
}
FAMILY = Family(
    name="gpt_oss",
    model=(EMBEDDING, maybe(HEAD)),
    layer=(NORMS, ATTENTION, QKV_BIAS, SINKS, EXPERTS),
)
