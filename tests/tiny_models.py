"""Plans and emitted models of small specs, each made once in a process."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from tiny_specs import SPECS
from torch import Tensor

import moegen
from moegen.graph.execute import Executable
from moegen.planner import Plan

BATCH, LENGTH = 2, 12
VOCABULARY = 61

Source = str | dict[str, Any]  # the name of a tiny spec, or a spec


def planned(source: Source, batch: int = BATCH, length: int = LENGTH) -> Plan:
    """The plan of a spec for a small batch."""
    return _planned(_text(source), batch, length)


def imported(source: Source) -> ModuleType:
    """The emitted package of a spec."""
    return _imported(_text(source))


def made(source: Source, seed: int = 0) -> Any:
    """The emitted model, with parameters that make every part matter."""
    return filled(imported(source).Model, seed)


def filled(make: Callable[[], Any], seed: int = 0) -> Any:
    """A model whose parameters make every part matter."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for key, buffer in model.named_buffers():
            if key.endswith("balance_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    return model


def twin(source: Source, model: torch.nn.Module) -> Executable:
    """The plan's graph itself, run node by node with the model's parameters."""
    graph = Executable(planned(source).root)
    graph.load_state_dict(model.state_dict())
    graph.train(model.training)
    return graph


def token_ids(batch: int = BATCH, length: int = LENGTH, seed: int = 1) -> Tensor:
    """Random token ids [batch, length]."""
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=chance)


def _text(source: Source) -> str:
    return json.dumps(SPECS[source] if isinstance(source, str) else source)


@cache
def _planned(text: str, batch: int, length: int) -> Plan:
    loaded = moegen.load(json.loads(text))
    short = {"sequence": length} if loaded.spec.model.unit == "token" else {}
    return moegen.plan(loaded, batch=batch, **short)


@cache
def _imported(text: str) -> ModuleType:
    return moegen.module(_planned(text, BATCH, LENGTH))
