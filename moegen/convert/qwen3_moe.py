"""Qwen3-MoE (Yang et al. 2025, arXiv:2505.09388)."""

from moegen.convert.family import Family, maybe
from moegen.convert.rows import (
    ATTENTION,
    DENSE,
    EMBEDDING,
    EXPERTS,
    HEAD,
    NORMS,
    PACKED_EXPERTS,
    QK_NORM,
    ROUTER,
)

FAMILY = Family(
    name="qwen3_moe",
    model=(EMBEDDING, maybe(HEAD)),
    layer=(NORMS, ATTENTION, QK_NORM, (DENSE, ROUTER | EXPERTS, ROUTER | PACKED_EXPERTS)),
)
