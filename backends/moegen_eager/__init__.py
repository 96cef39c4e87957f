"""The eager backend: every op is emitted as the plain PyTorch that defines it."""

from moegen.backend import Backend
from moegen.emit.sources import ops_module

BACKEND = Backend(
    name="eager",
    summary="plain PyTorch; runs wherever torch runs",
    ops=ops_module,
)
