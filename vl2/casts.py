"""Stored weights as the float32 numbers that a CPU computes with, and as any type elsewhere."""

from __future__ import annotations

import numpy as np
import paddle

from vl2 import ways, weight_kernels
from vl2.arrays import empty, read


def cast(x: paddle.Tensor, dtype: paddle.dtype) -> paddle.Tensor:
    """A frozen tensor in another type: `x.astype(dtype)`, which no gradient goes through.

    On a CPU 16-bit numbers become float32 in a kernel: Paddle's own takes twice as long.
    """
    if x.dtype not in (paddle.bfloat16, paddle.float16) or dtype != paddle.float32 or not ways.takes_kernels(x.place):
        return x.astype(dtype)
    bits = read(x)
    wide, out = empty(x.shape)
    if x.dtype == paddle.bfloat16:
        weight_kernels.widen_bfloat16(bits.reshape(-1), out.view(np.uint32).reshape(-1))
    else:
        weight_kernels.widen_float16(bits.view(np.uint16).reshape(-1), out.reshape(-1))
    return wide
