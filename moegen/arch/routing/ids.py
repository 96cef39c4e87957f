"""Ids that a router reads beside tokens: names that become arguments of the model."""

from __future__ import annotations

import keyword
import re
from typing import Annotated

from pydantic import AfterValidator

from moegen.ops.op import OPS
from moegen.spec.element import Broken

TOKEN = "token"  # the model's own input, which every program has

# What programs and records call other things.
_TAKEN = {"ids", "mask", "labels", "x", "valid", "start", "cache", "self", "positions", "context"}
_TAKEN |= {"torch", "out", "inplace", "temperature", "new_tokens", "generate", "input", "dim"}
_TAKEN |= {"batch", "length", "tokens", "routing", "count", "index", "cos", "sin", "logits", "loss"}
_TAKEN |= {"images"}


def _name(name: str) -> str:
    problem = None
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name) or keyword.iskeyword(name):
        problem = f"{name[:40]!r} cannot be an argument's name: use lower-case letters, digits, _"
    elif name in _TAKEN or name in OPS or keyword.issoftkeyword(name):
        problem = f"{name!r} means something else already; choose another name for these ids"
    if problem:
        raise Broken([((), problem)])
    return name


def named(name: str) -> str:
    """The name of some ids as sentences have it: `id`, or `task id`."""
    return "id" if name == TOKEN else f"{name} id"


IdName = Annotated[str, AfterValidator(_name)]
