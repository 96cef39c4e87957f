"""DeepSeek-V2 (arXiv:2405.04434)."""

from moegen.convert.family import Family, Rows, maybe
from moegen.convert.rows import (
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

BESIDE: Rows = ROUTER | SHARED
FAMILY = Family(
    name="deepseek_v2",
    model=(EMBEDDING, maybe(HEAD)),
    layer=(
        NORMS,
        LATENT_ATTENTION,
        (LOW_RANK_QUERY, FULL_QUERY),
        (DENSE, BESIDE | EXPERTS, BESIDE | PACKED_EXPERTS),
    ),
)
