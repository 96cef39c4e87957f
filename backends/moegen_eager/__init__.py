"""The eager backend: every op is emitted as the plain PyTorch that defines it."""

from moegen.backend import Backend
from moegen.emit.sources import ops_module
from moegen.passes.fusions.experts import fuse_experts

BACKEND = Backend(
    name="eager",
    summary="plain PyTorch; runs wherever torch runs",
    ops=ops_module,
    fusions=(fuse_experts,),
)
