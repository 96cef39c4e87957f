"""DeepSeek-V3 (arXiv:2412.19437), without its multi-token prediction layers."""

from moegen.convert.family import Family, Rows, maybe
from moegen.convert.rows import (
    BALANCE_BIAS,
    DENSE,
    EMBEDDING,
    EXPERTS,
    FULL_QUERY,
    HEAD,
    LATENT_ATTENTION,
    LOW_RANK_QUERY,
    NORMS,
    PACKED_EXPERTS,
    ROUTER,
    SHARED,
)

BESIDE: Rows = ROUTER | BALANCE_BIAS | SHARED
FAMILY = Family(
    name="deepseek_v3",
    model=(EMBEDDING, maybe(HEAD)),
    layer=(
        NORMS,
        LATENT_ATTENTION,
        (LOW_RANK_QUERY, FULL_QUERY),
        (DENSE, BESIDE | EXPERTS, BESIDE | PACKED_EXPERTS),
    ),
)
