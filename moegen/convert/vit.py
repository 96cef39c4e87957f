"""ViT that classifies images (Dosovitskiy et al. 2021, arXiv:2010.11929), as it is on disk."""

from moegen.convert.family import Family, Rows
from moegen.convert.layout import Leading

MODEL: Rows = {
    "class_token": Leading("vit.embeddings.cls_token", 2),
    "positions": Leading("vit.embeddings.position_embeddings", 1),
    "patches": "vit.embeddings.patch_embeddings.projection.weight",
    "patches_bias": "vit.embeddings.patch_embeddings.projection.bias",
    "norm": "vit.layernorm.weight",
    "norm_bias": "vit.layernorm.bias",
    "head": "classifier.weight",
    "head_bias": "classifier.bias",
}
LAYER: Rows = {
    f"{ours}{ours_end}": f"{theirs}.{end}"
    for ours, theirs in {
        "attention_norm": "layernorm_before",
        "ffn_norm": "layernorm_after",
        "attention.query": "attention.attention.query",
        "attention.key": "attention.attention.key",
        "attention.value": "attention.attention.value",
        "attention.output": "attention.output.dense",
        "ffn.up": "intermediate.dense",
        "ffn.down": "output.dense",
    }.items()
    for ours_end, end in (("", "weight"), ("_bias", "bias"))
}
FAMILY = Family(
    name="vit",
    model=(MODEL,),
    layer=(LAYER,),
    layers=("layers.{layer}.", "vit.encoder.layer.{layer}."),
)
