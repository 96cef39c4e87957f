"""Precision: in which number formats a model keeps and computes what."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from moegen.spec.element import Element

DType = Literal["fp64", "fp32", "bf16", "fp16"]

DTYPES: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class Precision(Element):
    """Number formats by role. The router runs in fp32 unless told otherwise ("selective
    precision", Switch Transformer section 2.4): in bf16 it picks other experts for up to 5% of
    tokens."""

    parameters: DType = Field("fp32", description="format in which parameters are kept")
    compute: DType | None = Field(None, description="format of activations; as parameters")
    router: DType = Field("fp32", description="format of router weights, scores and gates")
    experts: DType | None = Field(None, description="format in which experts compute; as compute")
    cache: DType | None = Field(None, description="format of the key-value cache; as compute")

    @property
    def parameter_dtype(self) -> torch.dtype:
        """The torch dtype of parameters."""
        return DTYPES[self.parameters]

    @property
    def compute_dtype(self) -> torch.dtype:
        """The torch dtype of activations."""
        return DTYPES[self.compute or self.parameters]

    @property
    def router_dtype(self) -> torch.dtype:
        """The torch dtype of the router."""
        return DTYPES[self.router]

    @property
    def expert_dtype(self) -> torch.dtype:
        """The torch dtype in which experts compute."""
        return DTYPES[self.experts or self.compute or self.parameters]

    @property
    def cache_dtype(self) -> torch.dtype:
        """The torch dtype of the key-value cache."""
        return DTYPES[self.cache or self.compute or self.parameters]
