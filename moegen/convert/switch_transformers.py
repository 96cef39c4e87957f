"""Switch Transformer (Fedus et al. 2021, arXiv:2101.03961)."""

from moegen.convert.family import Family, Part, Rows
from moegen.convert.layout import Stack
from moegen.convert.t5_rows import CROSS, DECODER, ENCODER, HEAD, MODEL, SELF, dense


def network(layer: str) -> Part:
    """A dense network, or a mixture of experts."""
    plain = dense(layer, "mlp")
    router = f"{layer}.mlp.router.classifier.weight"
    expert = f"{layer}.mlp.experts.expert_{{expert}}"
    experts: Rows = {
        "ffn_norm": f"{layer}.layer_norm.weight",
        "moe.router": router,
        "moe.up": Stack(f"{expert}.wi.weight", like=router),
        "moe.down": Stack(f"{expert}.wo.weight", like=router),
    }
    return (plain[0], experts) if isinstance(plain, tuple) else experts


FAMILY = Family(
    name="switch_transformers",
    model=(MODEL, HEAD),
    layer=(SELF, network("layer.1")),
    layers=ENCODER,
    more=(((SELF, CROSS, network("layer.2")), DECODER),),
)
