"""Dropout whose choice is mixed from a seed and a number's place, where compiled loops make it.

Paddle's draws every number with one core, which took a CPU a fifteenth of a step. Nothing has to be kept for backward.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import paddle
from paddle import nn
from paddle.autograd import PyLayer, PyLayerContext

from vl2 import cpu_kernels, ways
from vl2.arrays import empty, read


class Rule(NamedTuple):
    """Which numbers stay, as `cpu_kernels.drop` takes it."""

    seed: np.uint32
    least: np.uint32
    factor: np.float32


def draw_seeds(number: int) -> list[int]:
    """Seeds of Paddle's generator: a run that goes on drops what it would have, a layer computed again what it did."""
    return paddle.randint(0, (1 << 31) - 1, [number]).tolist()


def rule(part: float, seed: int) -> Rule:
    """Drops a part of all numbers, from 0 to less than 1."""
    return Rule(np.uint32(seed % (1 << 32)), np.uint32(part * (1 << 32)), np.float32(1 / (1 - part)))


class _Drop(PyLayer):
    @staticmethod
    def forward(ctx: PyLayerContext, x: paddle.Tensor, part: float) -> paddle.Tensor:
        ctx.rule = rule(part, draw_seeds(1)[0])
        return _dropped(x, ctx.rule)

    @staticmethod
    def backward(ctx: PyLayerContext, grad: paddle.Tensor) -> paddle.Tensor:
        return _dropped(grad, ctx.rule)


def _dropped(x: paddle.Tensor, chosen: Rule) -> paddle.Tensor:
    dropped, out = empty(x.shape)
    width = x.shape[-1]
    cpu_kernels.drop(read(x).reshape(-1, width), *chosen, out.reshape(-1, width))
    return dropped


class Dropout(nn.Dropout):
    """paddle.nn.Dropout; on a CPU as above."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """Any shape; while training some numbers are zeros and the others larger."""
        if self.training and self.p and ways.takes_float32_kernels(x):
            return _Drop.apply(x, float(self.p))
        return super().forward(x)
