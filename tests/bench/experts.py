"""The experts of a layer beside their bare products, by hand: `bash launch.sh bench experts`.

6,144 rows (1,024 tokens of six choices) over 32 experts of the model of `bench step`, LoRA of rank 8, forward and
backward on this CPU, for even and for skewed loads. Ours is a whole layer: rows copied to their experts, both products
with LoRA, what lies between them, and the sums. The bare products are those of the weights (forward, and the gradient
of the rows) and of the factors (forward, and the gradients of rows and factors), each written where it belongs, nothing
added up. All of them in turns; the last line is JSON: for each load the seconds of the bare products of the weights, of
all products and of ours, the median of ours over all products of the same turn, and that of our products alone: of what
is left of ours without the loops that copy rows, compute what lies between the products, and add up.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import numpy as np
import paddle

from tests.vl2.expert_loads import zipf
from vl2 import cpu_kernels
from vl2.expert_rows import dispatch
from vl2.lora_layers import ExpertsLoRA
from vl2.moe import Experts

EXPERTS, WIDTH, INNER, RANK, CHOICES, ROWS = 32, 512, 352, 8, 6, 6144
LOADS = {"even": 0.0, "zipf 0.3": 0.3, "zipf 1": 1.0}  # powers of `zipf`


class Product:
    """One grouped product, bare: rows, weight, factors, and what comes back."""

    def __init__(self, into: int, out: int, rank: int, rows: int):
        self.x, self.grad = paddle.randn([rows, into]), paddle.randn([rows, out])
        self.weight = paddle.randn([EXPERTS, into, out])
        self.a, self.b = paddle.randn([EXPERTS, into, rank]), paddle.randn([EXPERTS, rank, out])

    def of_weights(self, counts: list[int]) -> None:
        """The products of the weights alone."""
        out, back = paddle.empty_like(self.grad), paddle.empty_like(self.x)
        for e, rows in _slices(counts):
            paddle.matmul(self.x[rows], self.weight[e], out=out[rows])
            paddle.matmul(self.grad[rows], self.weight[e], transpose_y=True, out=back[rows])

    def of_factors(self, counts: list[int]) -> None:
        """The products of the factors alone."""
        out, back, low = (paddle.empty_like(t) for t in (self.grad, self.x, self.x[:, : self.a.shape[2]]))
        grad_low, grad_a, grad_b = (paddle.empty_like(t) for t in (low, self.a, self.b))
        for e, rows in _slices(counts):
            paddle.matmul(self.x[rows], self.a[e], out=low[rows])
            paddle.matmul(low[rows], self.b[e], out=out[rows])
            paddle.matmul(self.grad[rows], self.b[e], transpose_y=True, out=grad_low[rows])
            paddle.matmul(low[rows], self.grad[rows], transpose_x=True, out=grad_b[e])
            paddle.matmul(self.x[rows], grad_low[rows], transpose_x=True, out=grad_a[e])
            paddle.matmul(grad_low[rows], self.a[e], transpose_y=True, out=back[rows])


class Timed:
    """A function that adds up what its calls take."""

    def __init__(self, function: Callable[..., None]):
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: object) -> None:
        """Calls it."""
        start = time.perf_counter()
        self.function(*arguments)
        self.seconds += time.perf_counter() - start


class Layer:
    """The experts as a model has them: both products."""

    def __init__(self) -> None:
        self.experts = Experts(EXPERTS, WIDTH, INNER)
        self.experts.lora = ExpertsLoRA(self.experts, rank=RANK, scaling=2.0, dropout=0.0)
        for name, parameter in self.experts.named_parameters():
            parameter.stop_gradient = "lora" not in name

    def ours(self, counts: list[int]) -> tuple[float, float]:
        """Seconds of forward and backward as in training, after the choices have been sorted; and of the products."""
        choices = np.random.default_rng(0).permutation(np.repeat(np.arange(EXPERTS), counts))
        where = dispatch(paddle.to_tensor(choices.reshape(-1, CHOICES)), EXPERTS)
        x_TD, weights_TC = paddle.randn([len(choices) // CHOICES, WIDTH]), paddle.rand(where.experts_TC.shape)
        grad = paddle.randn(x_TD.shape)
        x_TD.stop_gradient = weights_TC.stop_gradient = False
        with contextlib.ExitStack() as stack:
            between = [
                stack.enter_context(mock.patch.object(cpu_kernels, name, Timed(getattr(cpu_kernels, name))))
                for name in ("take_rows", "gated", "gated_grad", "add_rows")
            ]
            start = time.perf_counter()
            self.experts(x_TD, weights_TC, where).backward(grad)
            seconds = time.perf_counter() - start
        self.experts.clear_gradients()
        return seconds, seconds - sum(loop.seconds for loop in between)


def _slices(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    bounds = itertools.pairwise(itertools.accumulate(counts, initial=0))
    return ((e, slice(start, stop)) for e, (start, stop) in enumerate(bounds) if stop > start)


def seconds_of(work: Callable[[list[int]], None], counts: list[int]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work(counts)
    return time.perf_counter() - start


def main(arguments: list[str]) -> None:
    """Entry script."""
    parser = argparse.ArgumentParser(
        prog="bash launch.sh bench experts", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--rows", type=int, default=ROWS, help=f"choices of all tokens (default {ROWS})")
    parser.add_argument("--repeats", type=int, default=9, help="turns (default 9)")
    asked = parser.parse_args(arguments)
    rows = asked.rows
    if rows % CHOICES:
        parser.error(f"--rows={rows}: expected a multiple of {CHOICES}, the choices of a token")
    products = Product(WIDTH, 2 * INNER, 2 * RANK, rows), Product(INNER, WIDTH, RANK, rows)  # gate and up, down
    layer = Layer()
    found: dict[str, np.ndarray] = {}  # [turns, kinds] of each load
    for turn in range(asked.repeats + 1):
        for load, power in LOADS.items():
            counts = zipf(EXPERTS, rows, power)
            taken = [
                sum(seconds_of(one.of_weights, counts) for one in products),
                sum(seconds_of(one.of_factors, counts) for one in products),
                *layer.ours(counts),
            ]
            if turn:  # the first one warms up
                found[load] = np.vstack([*([found[load]] if load in found else []), taken])
    said = {}
    for load, seconds in found.items():
        weights, factors, ours, alone = seconds.T
        ratio, ratio_alone = (float(np.median(part / (weights + factors))) for part in (ours, alone))
        said[load] = [*(float(part.min()) for part in (weights, weights + factors, ours)), ratio, ratio_alone]
        print(f"{load:>8}: weights {weights.min():.3f} s, all products {said[load][1]:.3f} s, ours {ours.min():.3f} s")
        print(f"{'':>8}  {ratio:.2f} times all products; our products alone {ratio_alone:.2f} times")
    print(json.dumps(said))
