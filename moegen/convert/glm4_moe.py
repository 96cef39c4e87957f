"""GLM-4.5 (arXiv:2508.06471), without its multi-token prediction layer."""

from moegen.convert.family import Family, Rows, maybe
from moegen.convert.rows import (
    ATTENTION,
    BALANCE_BIAS,
    DENSE,
    EMBEDDING,
    EXPERTS,
    HEAD,
    NORMS,
    PACKED_EXPERTS,
    QK_NORM,
    QKV_BIAS,
    ROUTER,
    SHARED,
)

BESIDE: Rows = ROUTER | BALANCE_BIAS | SHARED
FAMILY = Family(
    name="glm4_moe",
    model=(EMBEDDING, maybe(HEAD)),
    layer=(
        NORMS,
        ATTENTION,
        maybe(QKV_BIAS),
        maybe(QK_NORM),
        (DENSE, BESIDE | EXPERTS, BESIDE | PACKED_EXPERTS),
    ),
)
