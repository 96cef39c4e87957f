"""What the records are that an encoder-decoder's programs exchange, and their fields."""

from __future__ import annotations

from collections.abc import Mapping

RECORDS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "EncoderContext": (
        "What every layer of the encoder needs beside the residual stream.",
        {
            "bias": "[1 or B, H, S, S], of attention's logits",
            "hidden": "[B, 1, 1, S], very low at padding, else 0",
            "buckets": "[S, S], of distances",
            "cos": "[S, r / 2]",
            "sin": "[S, r / 2]",
            "valid": "[B * S], False at padding",
        },
    ),
    "DecoderContext": (
        "What every layer of the decoder needs beside the residual stream.",
        {
            "memory": "[B, S, d], what the encoder made of the source",
            "source": "[B, 1, 1, S], very low at its padding, else 0",
            "bias": "[1, H, T, T], of attention's logits",
            "buckets": "[T, T], of distances",
            "cos": "[T, r / 2]",
            "sin": "[T, r / 2]",
            "valid": "[B * T], False at padding",
        },
    ),
    "Place": (
        "Where in the target a decoding step stands.",
        {
            "start": "[]",
            "positions": "[T]",
            "source": "[B, 1, 1, S], very low at its padding, else 0",
            "bias": "[1, H, T, L], of attention's logits",
            "buckets": "[T, L], of distances",
            "hidden": "[T, L], very low at later positions, else 0",
            "cos": "[T, r / 2]",
            "sin": "[T, r / 2]",
        },
    ),
    "Cache": (
        "What decoding keeps of a batch of sources and of what was written so far.",
        {
            "source": "[B, 1, 1, S], very low at padding, else 0",
            "layers": "target's, source's",
        },
    ),
}
