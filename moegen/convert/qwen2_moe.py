"""Qwen2-MoE and Qwen1.5-MoE (Yang et al. 2024, arXiv:2407.10671)."""

from moegen.convert.family import Family, Rows, maybe
from moegen.convert.rows import (
    ATTENTION,
    DENSE,
    EMBEDDING,
    EXPERTS,
    HEAD,
    NORMS,
    PACKED_EXPERTS,
    QKV_BIAS,
    ROUTER,
)

BESIDE: Rows = ROUTER | {
    "moe.shared.gate": "mlp.shared_expert.gate_proj.weight",
    "moe.shared.up": "mlp.shared_expert.up_proj.weight",
    "moe.shared.down": "mlp.shared_expert.down_proj.weight",
    "moe.shared_gate": "mlp.shared_expert_gate.weight",
}
FAMILY = Family(
    name="qwen2_moe",
    model=(EMBEDDING, maybe(HEAD)),
    layer=(NORMS, ATTENTION, maybe(QKV_BIAS), (DENSE, BESIDE | EXPERTS, BESIDE | PACKED_EXPERTS)),
)
