"""Decoder layers whose weights or gradients lie with several processes: here while the layer computes, no longer."""

from __future__ import annotations

from typing import Any, Protocol

import paddle
from paddle import nn
from paddle.autograd import PyLayer


class LayerWeights(Protocol):
    """What brings a layer's weights, and takes its gradients. Every process calls the same methods in one order."""

    def fetch(self, index: int) -> None:
        """Let the weights of decoder layer `index` be here."""

    def release(self, index: int) -> None:
        """Let go of those that other processes keep."""

    def collect(self, index: int) -> None:
        """Take the gradients that the weights of a layer hold after its backward pass."""


def computed_with(weights: LayerWeights, index: int, layer: nn.Layer, x_TD: paddle.Tensor, *args: Any) -> Any:
    """layer(x_TD, *args), whose weights come before it computes and go after; with gradients, it computes once more.

    Args:
        weights: of all layers.
        index: of this one.
        x_TD: its input, through which gradients flow on; no other argument has any.
    """
    if not paddle.is_grad_enabled():
        weights.fetch(index)
        made = layer(x_TD, *args)
        weights.release(index)
        return made
    # The first layer's input may need no gradient where its weights do, which no argument shows.
    needs_grad = paddle.zeros([1])
    needs_grad.stop_gradient = False
    whole: list[bool] = []
    made = _Computed.apply(x_TD, needs_grad, weights, index, layer, args, whole)
    return made if whole[0] else (made, None)


class _Computed(PyLayer):
    """A layer's forward pass without a graph, and in backward the same pass with one; the same dropout in both."""

    @staticmethod
    def forward(ctx, x_TD, needs_grad, weights, index, layer, args, whole):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x_TD)
        ctx.pass_on = not x_TD.stop_gradient
        ctx.of_layer = weights, index, layer, args, paddle.get_rng_state()
        weights.fetch(index)
        with paddle.no_grad():
            made = layer(x_TD, *args)
        weights.release(index)
        whole.append(not (isinstance(made, tuple) and made[1] is None))  # a dense layer has no load-balance loss
        return made if whole[0] else made[0]

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        weights, index, layer, args, random_state = ctx.of_layer
        (saved_TD,) = ctx.saved_tensor()
        x_TD = saved_TD.detach()
        x_TD.stop_gradient = not ctx.pass_on
        now = paddle.get_rng_state()
        paddle.set_rng_state(random_state)
        weights.fetch(index)
        with paddle.enable_grad():
            made = layer(x_TD, *args)
        paddle.set_rng_state(now)
        outputs = [each for each in made if each is not None] if isinstance(made, tuple) else [made]
        paddle.autograd.backward(outputs, list(grads))
        weights.collect(index)
        weights.release(index)
        return x_TD.grad if ctx.pass_on else None, paddle.zeros([1])
