"""Mixtral (Jiang et al. 2024, arXiv:2401.04088)."""

from moegen.convert.family import Family, Rows, maybe
from moegen.convert.layout import Concat, Stack
from moegen.convert.rows import ATTENTION, EMBEDDING, HEAD, NORMS, PACKED_EXPERTS, ROUTER

EXPERTS: Rows = {
    "moe.router": "block_sparse_moe.gate.weight",
    "moe.gate_up": Stack(
        Concat(
            "block_sparse_moe.experts.{expert}.w1.weight",
            "block_sparse_moe.experts.{expert}.w3.weight",
        ),
        like="block_sparse_moe.gate.weight",
    ),
    "moe.down": Stack(
        "block_sparse_moe.experts.{expert}.w2.weight", like="block_sparse_moe.gate.weight"
    ),
}
FAMILY = Family(
    name="mixtral",
    model=(EMBEDDING, maybe(HEAD)),
    layer=(NORMS, ATTENTION, (EXPERTS, ROUTER | PACKED_EXPERTS)),
)
