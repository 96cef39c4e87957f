"""OLMoE (Muennighoff et al. 2024, arXiv:2409.02060)."""

from moegen.convert.family import Family, maybe
from moegen.convert.rows import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    HEAD,
    NORMS,
    PACKED_EXPERTS,
    QK_NORM,
    ROUTER,
)

FAMILY = Family(
    name="olmoe",
    model=(EMBEDDING, maybe(HEAD)),
    layer=(NORMS, ATTENTION, QK_NORM, (ROUTER | EXPERTS, ROUTER | PACKED_EXPERTS)),
)
