"""Products of float32 matrices on tensor cores of 16 bits, by pieces of eight bits each.

A float32 is the sum of three bfloat16 numbers. Pieces are multiplied exactly, small ones are added
first, and every step's sum is added to the total in float32: what tensor cores round off between
steps does not gather.
"""

import triton
import triton.language as tl

from .device import dot, narrow


@triton.jit
def _split(x):
    """The float32 x as its nearest bfloat16 and what is left."""
    near = narrow(x, tl.bfloat16)
    return near, x - near.to(tl.float32)


@triton.jit
def times_float32(x, w, total, PRECISION: tl.constexpr):
    """total + x [m, k] @ w [k, n] for a float32 w, as exact as in float32.

    x of 16 bits is multiplied by pieces of w; PRECISION is that of products of float32 x.
    """
    if x.dtype == tl.float32:
        total = dot(x, w, total, PRECISION)
    else:
        w0, rest = _split(w)
        w1, rest = _split(rest)
        w2 = narrow(rest, tl.bfloat16)
        part = tl.zeros_like(total)
        if (
            x.dtype == tl.float16
        ):  # two pieces exactly; x1 * w2 is below float32's last bit
            x0, rest = _split(x.to(tl.float32))
            x1 = narrow(rest, tl.bfloat16)
            part = dot(x1, w1, part, PRECISION)
            part = dot(x0, w2, part, PRECISION)
            part = dot(x1, w0, part, PRECISION)
        else:
            x0 = x
            part = dot(x0, w2, part, PRECISION)
        part = dot(x0, w1, part, PRECISION)
        total += dot(x0, w0, part, PRECISION)
    return total


@triton.jit
def times_to_16_bits(a, b, total, PRECISION: tl.constexpr):
    """total + a [m, k] @ b [k, n] in float32, for a result that is rounded to 16 bits."""
    a0, rest = _split(a)
    a1 = narrow(rest, tl.bfloat16)
    b0, rest = _split(b)
    b1 = narrow(rest, tl.bfloat16)
    total = dot(a0, b1, total, PRECISION)
    total = dot(a1, b0, total, PRECISION)
    return dot(a0, b0, total, PRECISION)
