"""The Triton backend: routed layers in a few fused kernels, which the package brings with it."""

from moegen.backend import Backend
from moegen_triton.emit import kernel_files, ops_text
from moegen_triton.fit import lacks, needs, says
from moegen_triton.fusions import FUSIONS
from moegen_triton.shapes import tune_package

BACKEND = Backend(
    name="triton",
    summary="fused Triton kernels; NVIDIA GPUs from compute capability 8.0",
    ops=ops_text,
    files=kernel_files,
    needs=needs,
    fusions=FUSIONS,
    lacks=lacks,
    says=says,
    tune=tune_package,
)
