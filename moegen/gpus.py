"""Accelerators that `--gpu` knows, with their vendors' figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One accelerator: memory in bytes, bandwidth in bytes/s, bf16 matrix products in FLOP/s."""

    name: str
    title: str
    memory: int
    bandwidth: float
    flops: float
    source: str


# Datasheets say GB for memory and mean 2**30 bytes: an "80 GB" H100 shows 81559 MiB. The driver
# keeps a percent or so of it, which the estimator's allowance covers. Inline ECC, on by default on
# the L4 and the L40S, takes another sixteenth, which is subtracted here. FLOP/s are the dense ones,
# with fp32 accumulation; datasheets often print those with 2:4 sparsity, which are twice as many.
_GIB = 1024**3
_ECC = 15 / 16


def _gpu(name: str, title: str, gib: float, tb_s: float, tflops: float, source: str) -> Gpu:
    return Gpu(name, title, int(gib * _GIB), tb_s * 1e12, tflops * 1e12, source)


_ADA = "NVIDIA Ada GPU Architecture whitepaper"
_RTX = "NVIDIA RTX Blackwell GPU Architecture whitepaper"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet"

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("rtx4090", "GeForce RTX 4090", 24, 1.008, 165.2, _ADA),
        _gpu("rtx5090", "GeForce RTX 5090", 32, 1.792, 209.5, _RTX),
        _gpu("l4", "L4", 24 * _ECC, 0.300, 121, "NVIDIA L4 Tensor Core GPU datasheet"),
        _gpu("l40s", "L40S", 48 * _ECC, 0.864, 362, "NVIDIA L40S GPU datasheet"),
        _gpu("a100-40gb", "A100 40 GB SXM", 40, 1.555, 312, _A100),
        _gpu("a100-80gb", "A100 80 GB SXM", 80, 2.039, 312, _A100),
        _gpu("h100", "H100 80 GB SXM", 80, 3.35, 989.5, "NVIDIA H100 Tensor Core GPU datasheet"),
        _gpu("h200", "H200 141 GB SXM", 141, 4.8, 989.5, "NVIDIA H200 Tensor Core GPU datasheet"),
        _gpu("b200", "B200 180 GB SXM", 180, 8.0, 2250, "NVIDIA DGX B200 datasheet"),
        _gpu("gb200", "GB200, one GPU", 186, 8.0, 2500, "NVIDIA GB200 NVL72 datasheet"),
        _gpu("mi300x", "Instinct MI300X", 192, 5.3, 1307.4, "AMD Instinct MI300X data sheet"),
        _gpu("mi325x", "Instinct MI325X", 256, 6.0, 1307.4, "AMD Instinct MI325X data sheet"),
        _gpu("mi355x", "Instinct MI355X", 288, 8.0, 2516.6, "AMD Instinct MI355X data sheet"),
    )
}
