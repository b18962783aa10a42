"""The gated activation of every MLP, SwiGLU, where Paddle's operations or one pass over memory compute it.

Shape suffixes: P rows, I inner channels.
"""

from __future__ import annotations

import numpy as np
import paddle
from paddle.autograd import PyLayer, PyLayerContext
from paddle.nn.functional import swiglu

from vl2 import cpu_kernels, ways
from vl2.arrays import empty, read

_NOTHING = np.empty((0, 0), np.float32)


def gated(gate_PI: paddle.Tensor, up_PI: paddle.Tensor) -> paddle.Tensor:
    """SiLU of the gate, times up: [P, I]."""
    if ways.takes_float32_kernels(gate_PI):
        return _Gated.apply(gate_PI, up_PI, None)
    return swiglu(gate_PI, up_PI)


def gated_pair(hidden_P2I: paddle.Tensor, weights_P1: paddle.Tensor) -> paddle.Tensor:
    """`gated` of rows that hold gate and up, times the weight of each row: [P, 2I] -> [P, I]."""
    if ways.takes_float32_kernels(hidden_P2I):
        return _Gated.apply(hidden_P2I, None, weights_P1)
    return swiglu(hidden_P2I) * weights_P1


class _Gated(PyLayer):
    """Keeps what it takes; autograd would keep what is between the two products as well."""

    @staticmethod
    def forward(
        ctx: PyLayerContext, gate: paddle.Tensor, up: paddle.Tensor | None, weights_P1: paddle.Tensor | None
    ) -> paddle.Tensor:
        """Gate and up [P, I], or both in one [P, 2I] -> [P, I]."""
        ctx.has_up, ctx.has_weights = up is not None, weights_P1 is not None
        ctx.save_for_backward(*(t.contiguous() for t in (gate, up, weights_P1) if t is not None))
        return _made(gate, up, weights_P1)

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor) -> tuple[paddle.Tensor, ...]:
        """Gradients of gate, up and weights, of those that there are."""
        gate, *rest = ctx.saved_tensor()
        up = rest.pop(0) if ctx.has_up else None
        gates, ups, stride, inner = _flat(gate, up)
        weights = _weights(rest[0] if rest else None, grad.size // inner)
        grads = [empty(t.shape) for t in (gate, up) if t is not None] + [empty([weights.size, 1])]
        to_gate, to_weights = (array.reshape(-1) for _, array in (grads[0], grads[-1]))
        to_up = to_gate[inner:] if up is None else grads[1][1].reshape(-1)
        cpu_kernels.gated_grad(
            gates, ups, stride, weights, read(grad).reshape(-1, inner), to_gate, to_up, _NOTHING, to_weights
        )
        return tuple(tensor for tensor, _ in (grads if ctx.has_weights else grads[:-1]))


def _made(gate: paddle.Tensor, up: paddle.Tensor | None, weights_P1: paddle.Tensor | None) -> paddle.Tensor:
    """What `_Gated` gives."""
    gates, ups, stride, inner = _flat(gate, up)
    made, out = empty([*gate.shape[:-1], inner])
    cpu_kernels.gated(gates, ups, stride, _weights(weights_P1, out.size // inner), out.reshape(-1, inner))
    return made


def _flat(gate: paddle.Tensor, up: paddle.Tensor | None) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Gates and ups, each flat from its first number on; numbers from row to row; I."""
    gates, stride = read(gate).reshape(-1), gate.shape[-1]
    if up is None:
        return gates, gates[stride // 2 :], stride, stride // 2
    return gates, read(up).reshape(-1), stride, stride


def _weights(weights_P1: paddle.Tensor | None, rows: int) -> np.ndarray:
    return np.ones(rows, np.float32) if weights_P1 is None else read(weights_P1).reshape(-1)
