"""Gradients between backward and the optimizer: reach check, zeros, sum over ranks, norm, clipping."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

from train.run.barrier import barrier

# Weights that only images reach: a step without images says nothing about them.
IMAGE_PARTS = ("vision.", "projector.", "image_newline", "view_seperator")
# Gradients that go to the other ranks together: Paddle copies all it is given into one row of buckets before it sends.
SLICE_BYTES = 10**9


class ReachCheck:
    """Proves once that backward reaches every trainable weight.

    A weight counts as reached when some micro-batch of some rank gave it a gradient, even one of zeros: A of a fresh
    LoRA pair has a zero gradient because B is zero, and an idle expert's slice is zero, but both are on the path. A
    weight that no path uses (an adapter on a projection whose `.weight` is read past its forward) gets none at all.
    """

    def __init__(self, names: list[str]):
        self._open = list(names)

    def update(self, reached: set[str], has_images: bool) -> None:
        """Take in one optimizer step.

        Args:
            reached: names of the parameters that hold a gradient on this rank.
            has_images: whether a supervised pack of this rank's step had images.

        Raises:
            RuntimeError: naming weights that the step should have reached; on all ranks alike.
        """
        if not self._open:
            return
        seen = np.array([has_images, *(name in reached for name in self._open)], dtype="int32")
        if dist.get_world_size() > 1:
            total = paddle.to_tensor(seen)
            dist.all_reduce(total)
            seen = total.numpy()
        missed = [name for name, count in zip(self._open, seen[1:], strict=True) if not count]
        lost = missed if seen[0] else [name for name in missed if not name.startswith(IMAGE_PARTS)]
        if lost:
            listed = ", ".join(lost[:8]) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
            raise RuntimeError(
                f"no gradient reaches {len(lost)} trainable weights in the first step: {listed}. The forward pass does "
                "not use them; take their group out of lora.groups (or their part out of trainable), or mend the model"
            )
        self._open = missed


def fill_zeros(parameters: Mapping[str, paddle.Tensor]) -> None:
    """Give zeros to parameters without a gradient (only text, an empty pack).

    So every rank reduces the same tensors, and AdamW's moments decay alike whichever rank saw the data.
    """
    for parameter in parameters.values():
        if parameter.grad is None:
            parameter.grad = paddle.zeros_like(parameter)


def sum_over_ranks(parameters: Mapping[str, paddle.Tensor]) -> None:
    """Replace the gradients by their sum over all ranks; every parameter must hold one."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return
    if paddle.get_device() == "cpu":
        barrier()  # as in `gather_rows`
    sizes = {name: int(p.grad.size) * p.grad.element_size() for name, p in parameters.items()}
    for names in reduction_slices(sizes):
        fused_allreduce_gradients([parameters[name] for name in names], None)  # gives the mean
    with paddle.no_grad():
        for parameter in parameters.values():
            parameter.grad.scale_(float(ranks))


def reduction_slices(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names of the gradients that are summed over the ranks together, in their order, at most `SLICE_BYTES` of them.

    A gradient that is larger is a slice by itself.

    Args:
        sizes: bytes of each gradient.
    """
    slices: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room:
            slices.append([])
            room = SLICE_BYTES
        slices[-1].append(name)
        room -= size
    return slices


@paddle.no_grad()
def gradient_norm(
    parameters: Mapping[str, paddle.Tensor],
    groups: Mapping[str, Sequence[str]] | None = None,
    shared: Collection[str] = (),
) -> tuple[float, dict[str, float]]:
    """2-norm of all gradients together, and of those of each group.

    Squares are summed in float32 within a gradient and in float64 over gradients, in the order of `parameters`. The
    host waits for the device once.

    Args:
        parameters: by name; each holds a gradient, but for those of `shared`, whose gradients their owners hold.
        groups: group -> names of parameters.
        shared: names of parameters whose gradients are divided among the processes. Collective where there are some.
    """
    squares = [
        paddle.zeros([1]) if p.grad is None else paddle._C_ops.squared_l2_norm(p.grad.astype("float32"))
        for p in parameters.values()
    ]
    each = paddle.concat(squares).astype("float64")
    if shared:
        divided = paddle.to_tensor([name in shared for name in parameters])
        of_all = each * divided.astype("float64")
        if paddle.get_device() == "cpu":
            barrier()  # as in `gather_rows`
        dist.all_reduce(of_all)  # one of the processes has a number, the others 0
        each = paddle.where(divided, of_all, each)
    read = paddle.concat([each, each.sum(keepdim=True)]).numpy()
    square_of = dict(zip(parameters, read.tolist(), strict=False))  # the last is their sum
    norms = {group: math.sqrt(sum(square_of[name] for name in names)) for group, names in (groups or {}).items()}
    return math.sqrt(read[-1]), norms


@paddle.no_grad()
def clip_gradients(parameters: Mapping[str, paddle.Tensor], norm: float, max_norm: float) -> None:
    """Scale all gradients down together when their norm is above the greatest one allowed.

    Args:
        parameters: those that hold a gradient are scaled.
        norm: from `gradient_norm`; finite.
        max_norm: 0 does not clip.
    """
    if 0 < max_norm < norm:
        # What fp16's loss scaler divides by its scale with: one operation for all.
        grads = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
        paddle._C_ops.check_finite_and_unscale_(grads, paddle.full([1], norm / max_norm))


def has_overflow(parameters: Mapping[str, paddle.Tensor]) -> bool:
    """Whether a gradient holds inf or nan: what fp16's loss scaler leaves a step out for."""
    return not all(bool(paddle.isfinite(p.grad).all()) for p in parameters.values())


def any_rank(*flags: bool) -> list[bool]:
    """For each flag whether it is set on some rank. Collective."""
    return [bool(flag) for flag in gather_rows(np.array([flags], dtype="float64")).any(axis=0)]


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """Rows of all ranks, float64 [ranks * n, columns]; every rank must give the same number."""
    if dist.get_world_size() == 1:
        return rows
    if paddle.get_device() == "cpu":
        barrier()  # gloo gives up after 30 seconds, and one rank's packs may take longer than another's
    parts: list[paddle.Tensor] = []
    dist.all_gather(parts, paddle.to_tensor(rows))
    return np.concatenate([part.numpy() for part in parts])
