"""Llama 4's language model (Meta 2025)."""

from moegen.convert.family import Family, Rows, maybe
from moegen.convert.layout import Transposed
from moegen.convert.rows import ATTENTION, EMBEDDING, HEAD, NORMS

DENSE: Rows = {
    "ffn.gate": "feed_forward.gate_proj.weight",
    "ffn.up": "feed_forward.up_proj.weight",
    "ffn.down": "feed_forward.down_proj.weight",
}
EXPERTS: Rows = {
    "moe.router": "feed_forward.router.weight",
    "moe.gate_up": Transposed("feed_forward.experts.gate_up_proj"),
    "moe.down": Transposed("feed_forward.experts.down_proj"),
    "moe.shared.gate": "feed_forward.shared_expert.gate_proj.weight",
    "moe.shared.up": "feed_forward.shared_expert.up_proj.weight",
    "moe.shared.down": "feed_forward.shared_expert.down_proj.weight",
}
FAMILY = Family(
    name="llama4_text",
    model=(EMBEDDING, maybe(HEAD)),
    layer=(NORMS, ATTENTION, (DENSE, EXPERTS)),
)
