"""Which of its ways a computation takes: few large operations on a GPU; loops, and compiled kernels, on a CPU."""

from __future__ import annotations

import paddle


def takes_batches(place: paddle.base.core.Place) -> bool:
    """Whether experts are multiplied in batches: on a GPU.

    There each product of the loop is a launch. On a CPU a batch of products runs on one core, one product on all.
    """
    return place.is_gpu_place()


def takes_float32_kernels(x: paddle.Tensor) -> bool:
    """Whether what is computed with these numbers takes the kernels, which are for float32."""
    return takes_kernels(x.place) and x.dtype == paddle.float32


def takes_kernels(place: paddle.base.core.Place) -> bool:
    """Whether what memory bounds runs in `vl2.cpu_kernels`: on a CPU, with numbers at hand.

    A static program that is being traced has none, and whoever asks for a GPU's way on a CPU wants its operations.
    """
    return paddle.in_dynamic_mode() and place.is_cpu_place() and not takes_batches(place)
