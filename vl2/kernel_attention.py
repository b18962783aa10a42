"""Softmax attention of float32 numbers on a CPU: products and compiled loops that write where their numbers belong.

Shape suffixes: T tokens of the stream, H heads, K channels of a q/k head, V channels of a v head; n queries of a block,
m keys that they see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import paddle
from paddle.autograd import PyLayer, PyLayerContext

from vl2 import cpu_kernels
from vl2.arrays import empty, read, read_strided
from vl2.products import multiply
from vl2.scratch import scratch

# Queries of a segment that are computed together: of a causal one fewer, for keys after them are skipped.
BLOCK, WIDE = 256, 1024
SCORES = 1 << 20  # of so many heads at a time that they are still in a cache when they are read; two heads at least


class Block(NamedTuple):
    """Some queries of a segment, the last of the keys that they see."""

    queries: slice  # of the stream
    keys: slice
    causal: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        return self.queries.stop - self.queries.start, self.keys.stop - self.keys.start

    @property
    def hidden(self) -> int:
        """Keys that the first query does not see."""
        return self.shape[0] - 1 if self.causal else 0


class KernelAttention(PyLayer):
    """Keeps two numbers for each row of softmax weights, and makes them again in backward.

    Weights that were kept would be the largest thing of a layer; a product of one head's width makes their scores.
    """

    @staticmethod
    def forward(
        ctx: PyLayerContext,
        q_THK: paddle.Tensor,
        k_THK: paddle.Tensor,
        v_THV: paddle.Tensor,
        q_lens: Sequence[int],
        k_lens: Sequence[int],
        scale: float,
        causal: bool,
    ) -> paddle.Tensor:
        """See `vl2.attention.attention`."""
        # Asked now: under recompute the saved tensors come back as other objects, whose flag says nothing.
        ctx.needs_grad = [not x.stop_gradient for x in (q_THK, k_THK, v_THV)]
        ctx.args = q_lens, k_lens, scale, causal
        # Heads first: MKL takes longer for rows that lie a power of two apart.
        (q_HTK, q), (k_HTK, k), (v_HTV, v) = _swapped(q_THK, scale), _swapped(k_THK), _swapped(v_THV)
        heads, tokens = q.shape[:2]
        (out_THV, out), (notes_HT2, notes) = empty([tokens, heads, v.shape[-1]]), empty([heads, tokens, 2])
        for block in _blocks(q_lens, k_lens, causal):
            for some in _some_heads(heads, block):
                weights = scratch("weights", some.stop - some.start, *block.shape)
                multiply(q[some, block.queries], k[some, block.keys], weights, transpose_b=True)
                kept = np.empty([len(weights) * block.shape[0], 2], np.float32)
                cpu_kernels.softmax(_rows(weights), block.shape[0], block.hidden, kept)
                notes[some, block.queries] = kept.reshape(len(weights), -1, 2)
                multiply(weights, v[some, block.keys], _heads_first(out)[some, block.queries])
        # Detached: what is given would hold its own node, and both stay where no backward is run.
        ctx.save_for_backward(q_HTK, k_HTK, v_HTV, out_THV.detach(), notes_HT2)
        return out_THV

    @staticmethod
    def backward(ctx: PyLayerContext, grad_THV: paddle.Tensor) -> tuple[paddle.Tensor | None, ...]:
        """Gradients of queries, keys and values; None where none is asked for."""
        q, k, v, out, notes = (read(saved) for saved in ctx.saved_tensor())
        q_lens, k_lens, scale, causal = ctx.args
        (_, grad), heads = _swapped(grad_THV), len(q)
        # sum_j weight_j * grad_weight_j of each query, which the softmax's backward subtracts
        mean = np.empty(grad.shape[:2], np.float32)
        cpu_kernels.dots(grad, _heads_first(out), mean)
        grads = [empty([x.shape[1], heads, x.shape[2]]) for x in (q, k, v)]
        grad_q, grad_k, grad_v = (_heads_first(array) for _, array in grads)
        begun: int | None = None  # the key that a segment begins with, which its other blocks add to
        for block in _blocks(q_lens, k_lens, causal):
            queries, keys, add = block.queries, block.keys, begun == block.keys.start
            for some in _some_heads(heads, block):
                weights, scores = (scratch(name, some.stop - some.start, *block.shape) for name in ("weights", "grads"))
                multiply(q[some, queries], k[some, keys], weights, transpose_b=True)
                multiply(grad[some, queries], v[some, keys], scores, transpose_b=True)
                of_rows = notes[some, queries].reshape(-1, 2), mean[some, queries].reshape(-1)
                cpu_kernels.softmax_grad(_rows(weights), _rows(scores), block.shape[0], block.hidden, *of_rows)
                multiply(scores, k[some, keys], grad_q[some, queries], factor=scale)
                multiply(scores, q[some, queries], grad_k[some, keys], transpose_a=True, add=add)
                multiply(weights, grad[some, queries], grad_v[some, keys], transpose_a=True, add=add)
            begun = keys.start
        return tuple(tensor if needed else None for (tensor, _), needed in zip(grads, ctx.needs_grad, strict=True))


def _blocks(q_lens: Sequence[int], k_lens: Sequence[int], causal: bool) -> list[Block]:
    """Of every segment, the last first: it has all keys, so that the others find sums to add to."""
    blocks, q_start, k_start = [], 0, 0
    for q_len, k_len in zip(q_lens, k_lens, strict=True):
        step = min(q_len, BLOCK if causal else WIDE)
        for start in reversed(range(0, q_len, step or 1)):
            stop = min(start + step, q_len)
            seen = k_len - q_len + stop if causal else k_len
            blocks.append(Block(slice(q_start + start, q_start + stop), slice(k_start, k_start + seen), causal))
        q_start, k_start = q_start + q_len, k_start + k_len
    return blocks


def _some_heads(heads: int, block: Block) -> list[slice]:
    """Heads that are computed together: an even number, of which each of two threads takes half."""
    n, m = block.shape
    at_once = max(2, SCORES // (n * m) // 2 * 2)
    return [slice(start, min(heads, start + at_once)) for start in range(0, heads, at_once)]


def _swapped(x: paddle.Tensor, factor: float = 1.0) -> tuple[paddle.Tensor, np.ndarray]:
    """[A, B, K] -> [B, A, K], contiguous, times a factor."""
    numbers, (row, head) = read_strided(x)
    swapped, out = empty([x.shape[1], x.shape[0], x.shape[2]])
    cpu_kernels.swap(numbers, row, head, np.float32(factor), out)
    return swapped, out


def _heads_first(x_THK: np.ndarray) -> np.ndarray:
    return x_THK.transpose(1, 0, 2)


def _rows(x_Hnm: np.ndarray) -> np.ndarray:
    return x_Hnm.reshape(-1, x_Hnm.shape[-1])
