"""What kernels need to know of where they run: the chip, or Triton's interpreter."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# TRITON_INTERPRET is read when a kernel is defined, so what holds now holds for good.
INTERPRET = bool(triton.knobs.runtime.interpret)
is_interpreting = tl.constexpr(INTERPRET)

# Triton's names of the formats that kernels take.
FORMATS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@functools.lru_cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; the interpreter passes for Hopper."""
    if device.type != "cuda":
        return (9, 0)
    index = torch.cuda.current_device() if device.index is None else device.index
    return _capability(index)


def has_tma(device: torch.device) -> bool:
    """Whether the chip copies tiles by descriptor; before Hopper that is only slower."""
    return torch.version.hip is None and capability(device) >= (9, 0)


def can_specialize(device: torch.device) -> bool:
    """Whether warps can be specialized: on Hopper, by Triton 3.6, and no later one yet."""
    if INTERPRET:
        return True
    return triton.__version__.startswith("3.6.") and capability(device)[0] == 9


def can_describe(x: Tensor) -> bool:
    """Whether a TMA descriptor can describe x: rows of whole 16 bytes, the last stride 1."""
    step = 16 // x.element_size()
    whole = all(stride % step == 0 for stride in x.stride()[:-1])
    return x.stride(-1) == 1 and whole and x.data_ptr() % 16 == 0 and x.numel() > 0


def precision() -> str:
    """How products of float32 are taken, as torch.set_float32_matmul_precision says."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def check_formats(*tensors: Tensor | None) -> None:
    """Refuse what the kernels do not compute in."""
    for x in tensors:
        if x is not None and x.dtype not in FORMATS:
            raise TypeError(
                f"the Triton kernels take float32, bfloat16 and float16, not {x.dtype}"
            )


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32."""
    if is_interpreting:  # where bfloat16 is multiplied as the integers of its bits
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """The float32 x as dtype, rounded to nearest even. Stores take this, never x itself."""
    if is_interpreting and dtype == tl.bfloat16:  # where the lower bits are cut off
        bits = x.to(tl.int32, bitcast=True)
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        bits = tl.where(is_nan, 0x7FC00000, bits + 0x7FFF + ((bits >> 16) & 1))
        y = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y
