"""NLLB-MoE (NLLB Team 2022, arXiv:2207.04672)."""

from moegen.convert.family import Family, Part, Rows
from moegen.convert.layout import Stack


def both(rows: dict[str, str]) -> Rows:
    """Weights and biases of pairs of names."""
    ends = (("", "weight"), ("_bias", "bias"))
    return {f"{o}{mine}": f"{t}.{end}" for o, t in rows.items() for mine, end in ends}


def attention(ours: str, theirs: str) -> dict[str, str]:
    """Attention and the norm before it."""
    parts = {"query": "q", "key": "k", "value": "v", "output": "out"}
    rows = {f"{ours}.{name}": f"{theirs}.{part}_proj" for name, part in parts.items()}
    return {f"{ours}_norm": f"{theirs}_layer_norm", **rows}


MODEL: Rows = {
    "embedding": "model.shared.weight",
    **both({f"{side}.norm": f"model.{side}.layer_norm" for side in ("encoder", "decoder")}),
}
SELF: Rows = both(attention("attention", "self_attn"))
CROSS: Rows = both(attention("cross", "cross_attention"))
NORM: Rows = both({"ffn_norm": "ff_layer_norm"})
ROUTER = "ffn.router.classifier.weight"
NETWORK: Part = (
    NORM | both({"ffn.up": "ffn.fc1", "ffn.down": "ffn.fc2"}),
    {
        **NORM,
        "moe.router": ROUTER,
        **{
            f"moe.{ours}": Stack(f"ffn.experts.expert_{{expert}}.{theirs}", like=ROUTER)
            for ours, theirs in {
                "up": "fc1.weight",
                "up_bias": "fc1.bias",
                "down": "fc2.weight",
                "down_bias": "fc2.bias",
            }.items()
        },
    },
)
FAMILY = Family(
    name="nllb-moe",
    model=(MODEL,),
    layer=(SELF, NETWORK),
    layers=("encoder.layers.{layer}.", "model.encoder.layers.{layer}."),
    more=(((SELF, CROSS, NETWORK), ("decoder.layers.{layer}.", "model.decoder.layers.{layer}.")),),
)
