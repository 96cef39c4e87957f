"""T5 (Raffel et al. 2020, arXiv:1910.10683), and its form with gated networks (T5 v1.1)."""

from moegen.convert.family import Family
from moegen.convert.t5_rows import CROSS, DECODER, ENCODER, HEAD, MODEL, SELF, dense

FAMILY = Family(
    name="t5",
    model=(MODEL, HEAD),
    layer=(SELF, dense("layer.1", "DenseReluDense")),
    layers=ENCODER,
    more=(((SELF, CROSS, dense("layer.2", "DenseReluDense")), DECODER),),
)
