"""Rows that T5 and Switch share, ours: theirs."""

from moegen.convert.family import Part, Rows, maybe

MODEL: Rows = {
    "embedding": "shared.weight",
    **{
        ours: theirs
        for side in ("encoder", "decoder")
        for ours, theirs in {
            f"{side}.norm": f"{side}.final_layer_norm.weight",
            f"{side}.position_bias": (
                f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            ),
        }.items()
    },
}
HEAD: Part = maybe({"head": "lm_head.weight"})
ENCODER = ("encoder.layers.{layer}.", "encoder.block.{layer}.")
DECODER = ("decoder.layers.{layer}.", "decoder.block.{layer}.")


def attention(ours: str, theirs: str) -> Rows:
    """Attention and the norm before it."""
    norm = theirs.rpartition(".")[0]
    parts = {"query": "q", "key": "k", "value": "v", "output": "o"}
    rows: Rows = {f"{ours}.{name}": f"{theirs}.{letter}.weight" for name, letter in parts.items()}
    return {f"{ours}_norm": f"{norm}.layer_norm.weight", **rows}


SELF: Rows = attention("attention", "layer.0.SelfAttention")
CROSS: Rows = attention("cross", "layer.1.EncDecAttention")


def dense(layer: str, network: str) -> Part:
    """A feed-forward network and the norm before it, gated or not."""
    norm: Rows = {"ffn_norm": f"{layer}.layer_norm.weight"}
    down: Rows = {"ffn.down": f"{layer}.{network}.wo.weight"}
    plain: Rows = {"ffn.up": f"{layer}.{network}.wi.weight"}
    gated: Rows = {
        "ffn.gate": f"{layer}.{network}.wi_0.weight",
        "ffn.up": f"{layer}.{network}.wi_1.weight",
    }
    return norm | down | plain, norm | down | gated
