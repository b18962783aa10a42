"""Rotary position embedding of pairs (i, i + K/2).

Shape suffixes: T tokens of the stream, H heads, K rotated channels.
"""

from __future__ import annotations

from collections.abc import Callable

import paddle
from paddle.autograd import PyLayer, PyLayerContext

from vl2 import cpu_kernels, ways
from vl2.arrays import empty, read

Rope = tuple[paddle.Tensor, paddle.Tensor]  # cosine and sine, see `rope_tables`


def rope_tables(position_ids_T: paddle.Tensor, size: int, theta: float, num_heads: int = 1) -> Rope:
    """Cosine and sine of rotary position embedding, float32: bfloat16 would merge distinct positions.

    Args:
        position_ids_T: int64 [T], restarting at 0 with each segment.
        size: rotated channels of a head, even.
        theta: base of the wavelengths.
        num_heads: heads the tables are laid out for; Paddle's CPU product of equal shapes is several times as fast as
            one that broadcasts, and one pair of tables serves all layers.

    Returns:
        (cos, sin), each [T, num_heads, size]; the first half of the sines is negative, see `rotate_half_split`.
    """
    inverse = 1.0 / (theta ** (paddle.arange(0, size, 2, dtype="float32") / size))
    angles = position_ids_T.astype("float32").unsqueeze(-1) * inverse.unsqueeze(0)
    cos, sin = paddle.cos(angles), paddle.sin(angles)
    tables = paddle.concat([cos, cos], axis=-1), paddle.concat([-sin, sin], axis=-1)
    shape = [angles.shape[0], num_heads, size]
    return tuple(table.unsqueeze(1).expand(shape).contiguous() for table in tables)


def rotate_half_split(x_THK: paddle.Tensor, cos_THK: paddle.Tensor, sin_THK: paddle.Tensor) -> paddle.Tensor:
    """Rotate pairs (i, i + K/2), as DeepSeek's MHA does; computed in float32, returned in x's dtype.

    Paddle's `fused_rotary_position_embedding` is not taken: it reads the tables in x's dtype, where 16 bits round them,
    and those that it makes by itself are of pairs (2i, 2i + 1). Source: phi/kernels/fusion/gpu/fused_rope_utils.h.

    x                    a b c d
    halves exchanged     c d a b
    sines                - - + +        result: a cos - c sin, b cos - d sin, c cos + a sin, d cos + b sin
    """
    return _Rotate.apply(x_THK, cos_THK, sin_THK)


class _Rotate(PyLayer):
    """A rotation; its gradient is the rotation back."""

    @staticmethod
    def forward(
        ctx: PyLayerContext, x_THK: paddle.Tensor, cos_THK: paddle.Tensor, sin_THK: paddle.Tensor
    ) -> paddle.Tensor:
        ctx.save_for_backward(cos_THK.contiguous(), sin_THK.contiguous())
        if ways.takes_float32_kernels(x_THK):
            return _rotated(cpu_kernels.rotate, x_THK, cos_THK, sin_THK)
        x, half = x_THK.astype("float32"), x_THK.shape[-1] // 2
        return (x * cos_THK + paddle.roll(x, half, axis=-1) * sin_THK).astype(x_THK.dtype)

    @staticmethod
    def backward(ctx: PyLayerContext, grad_THK: paddle.Tensor) -> tuple[paddle.Tensor, None, None]:
        cos_THK, sin_THK = ctx.saved_tensor()
        if ways.takes_float32_kernels(grad_THK):
            return _rotated(cpu_kernels.rotate_back, grad_THK, cos_THK, sin_THK), None, None
        grad, half = grad_THK.astype("float32"), grad_THK.shape[-1] // 2
        return (grad * cos_THK + paddle.roll(grad * sin_THK, half, axis=-1)).astype(grad_THK.dtype), None, None


def _rotated(rotation: Callable[..., None], *tensors: paddle.Tensor) -> paddle.Tensor:
    rotated, out = empty(tensors[0].shape)
    rotation(*(array.reshape(-1, out.shape[-1]) for array in (*map(read, tensors), out)))
    return rotated
