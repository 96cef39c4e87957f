"""Weights of Hugging Face's models for emitted ones, and back: a table for each model type."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from moegen.convert import (
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    granitemoe,
    llama4,
    mixtral,
    nllb_moe,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    switch_transformers,
    t5,
    vit,
)
from moegen.convert.family import Family
from moegen.convert.layout import ConversionError
from moegen.errors import Problem
from moegen.spec.words import listed, nearest

_MODULES = (
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    granitemoe,
    llama4,
    mixtral,
    nllb_moe,
    olmoe,
    qwen2_moe,
    qwen3_moe,
    switch_transformers,
    t5,
    vit,
)
FAMILIES: Mapping[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}


def to_moegen(family: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Hugging Face state dict, as on disk or in memory, by the names of an emitted model.

    family: the model type of its config, e.g. "mixtral". Tensors that need no change are shared.
    """
    return _family(family).to_moegen(tensors)


def to_huggingface(family: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An emitted model's state dict by the names and layouts of Hugging Face's checkpoints."""
    return _family(family).to_huggingface(tensors)


def _family(name: str) -> Family:
    if name not in FAMILIES:
        meant = nearest(name, FAMILIES)
        known = f"there are {listed(sorted(FAMILIES), 'and')}"
        hint = f"did you mean {meant!r}?" if meant else known
        raise ConversionError(Problem(f"no table for {name!r}", hint=hint))
    return FAMILIES[name]


__all__ = ["FAMILIES", "ConversionError", "Family", "to_huggingface", "to_moegen"]
