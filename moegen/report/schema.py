"""The JSON Schema of specs as text."""

from __future__ import annotations

import json

from moegen.arch.spec import Spec
from moegen.plugins import load_installed
from moegen.spec.schema import json_schema


def schema_text() -> str:
    """The schema of a whole spec, with the kinds of installed plugins, as a file."""
    load_installed()
    return json.dumps(json_schema(Spec), indent=2, ensure_ascii=False) + "\n"
