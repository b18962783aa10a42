"""Stored weights as the float32 numbers that a CPU computes with, and as any type elsewhere."""

from __future__ import annotations

import numpy as np
import paddle

from vl2 import cpu_kernels, ways
from vl2.arrays import empty, read, tensor_of


def cast(x: paddle.Tensor, dtype: paddle.dtype) -> paddle.Tensor:
    """A frozen tensor in another type: `x.astype(dtype)`, which no gradient goes through.

    On a CPU 16-bit numbers become float32 in a kernel: Paddle's own takes twice as long.
    """
    if x.dtype not in (paddle.bfloat16, paddle.float16) or dtype != paddle.float32 or not ways.takes_kernels(x.place):
        return x.astype(dtype)
    bits = read(x)
    out = empty(x.shape)
    if x.dtype == paddle.bfloat16:
        cpu_kernels.widen_bfloat16(bits.reshape(-1), out.view(np.uint32).reshape(-1))
    else:
        cpu_kernels.widen_float16(bits.view(np.uint16).reshape(-1), out.reshape(-1))
    return tensor_of(out)


def from_nf4(codes: paddle.Tensor, scales: paddle.Tensor) -> paddle.Tensor:
    """The numbers that block-wise 4-bit codes stand for: each is its code's value times its block's scale.

        codes  0x2f 0x70 ...    the low four bits first: values 15, 2, 0, 7, ...
        scales 0.5 ...          of 64 values each: 1.0 * 0.5, -0.525 * 0.5, -1.0 * 0.5, 0.0 * 0.5, ...

    Args:
        codes: uint8 [n / 2], two values a byte; n is a multiple of 64.
        scales: float32 [n / 64].

    Returns:
        float32 [n].
    """
    if ways.takes_kernels(codes.place):
        out = empty([2 * codes.shape[0]])
        cpu_kernels.nf4(read(codes), read(scales), out)
        return tensor_of(out)
    values = paddle.to_tensor(cpu_kernels.NF4_VALUES, place=codes.place)
    wide = codes.astype("int32")
    pairs = paddle.stack([wide % 16, wide // 16], axis=-1)
    numbers = paddle.gather(values, pairs.flatten()).reshape([-1, cpu_kernels.NF4_BLOCK])
    return (numbers * scales.unsqueeze(-1)).flatten()
