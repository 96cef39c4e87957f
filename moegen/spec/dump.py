"""Turns the data of a spec back into YAML that reads as the same data."""

from __future__ import annotations

from typing import Any

import yaml

from moegen.spec.scalars import Refused, resolve

WIDTH = 100


def resolved_yaml(data: dict[str, Any]) -> str:
    """A spec with everything it extends and all overrides in one text; order of keys is kept."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=WIDTH, allow_unicode=True)


def inline_yaml(value: Any) -> str:
    """A value in one line, as a spec has it behind a key."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=10**6)
    return str(text).removesuffix("\n").removesuffix("\n...")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # specs have no aliases


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML quotes what YAML 1.1 would misread; `1e-4` is a number only as specs are read.
    try:
        is_plain = resolve(text) == text
    except Refused:
        is_plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else "'")


_Dumper.add_representer(str, _text)
