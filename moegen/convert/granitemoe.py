"""Granite 3 MoE (IBM 2024)."""

from moegen.convert.family import Family, Rows, maybe
from moegen.convert.rows import ATTENTION, EMBEDDING, HEAD, NORMS

EXPERTS: Rows = {
    "moe.router": "block_sparse_moe.router.layer.weight",
    "moe.gate_up": "block_sparse_moe.input_linear.weight",
    "moe.down": "block_sparse_moe.output_linear.weight",
}
# As transformers' models hold them in memory.
PACKED_EXPERTS: Rows = {
    "moe.router": "block_sparse_moe.router.weight",
    "moe.gate_up": "block_sparse_moe.experts.gate_up_proj",
    "moe.down": "block_sparse_moe.experts.down_proj",
}
FAMILY = Family(
    name="granitemoe",
    model=(EMBEDDING, maybe(HEAD)),
    layer=(NORMS, ATTENTION, (EXPERTS, PACKED_EXPERTS)),
)
