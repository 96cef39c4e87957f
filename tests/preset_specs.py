"""Every preset of `moe` over a tiny decoder, with the sizes that presets leave to their users."""

from __future__ import annotations

from typing import Any

EXPERTS = {"count": 16, "width": 32}
TASKS = {"count": 3}
SIZES: dict[str, dict[str, Any]] = {
    "st-moe": {"extra": 48},
    "openmoe-8b": {"extra": 48},
    "openmoe": {"extra": 48},
    "shazeer2017-hierarchical": {"experts": {"count": 4, "width": 32, "nested": {"count": 4}}},
    "hme1994": {"experts": {"count": 2, "width": 32}},
    "limoe": {"losses": {"image_global": {"spread": 12.0}}},
    "task-moe": {"router": {"input": TASKS}},
    "mmoe": {"router": {"gates": TASKS}},
    "mod-squad": {"router": {"gates": TASKS}, "losses": {"mutual_information": TASKS}},
}


def tiny_over(name: str, layers: int = 6, **changes: Any) -> dict[str, Any]:
    moe = {"preset": name, "experts": EXPERTS, **SIZES.get(name, {}), **changes}
    shape = {"vocab_size": 256, "d_model": 64, "layers": layers, "max_sequence": 64, "ffn": 128}
    return {"name": "x", "model": {**shape, "attention": {"heads": 4}, "moe": moe}}


def laid_over(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = laid_over(out[key], value) if both else value
    return out
