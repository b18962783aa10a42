"""Stages 2 and 3: the gradients of a decoder layer, and its weights too, with the process that owns them.

    stage 2    backward of layer i: each gradient is summed into its owner's, the others' is dropped
    stage 3    and before layer i computes, forward or backward, each weight comes from its owner; after, it goes

What lies outside the decoder layers (tower, projector, embedding, head: a tenth of the model and less) stays whole in
every process, as in stage 1. Paddle's own classes for these stages want a GPU and wrap forward(), where the loss of
this model is another method; this is the same exchange by `paddle.distributed`'s standard calls, on a CPU as on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import paddle
import paddle.distributed as dist

from train.run.shard.partition import layer_of, owners


class SharedLayers:
    """The decoder layers that all processes of a run share; what the model calls around each of them.

    Every process makes the same number of passes: where one has nothing to compute it calls `idle`.

    Args:
        parameters: all that train, by name; those of the decoder layers are shared.
        stage: 2 or 3.
        rank, num_ranks: of this process, of how many.
        meet: waits for all processes; called before they exchange.

    Attributes:
        names: of the shared parameters.
        owner: of every parameter, its process.
        passes: how often the first of these layers has been fetched.
    """

    def __init__(
        self,
        parameters: Mapping[str, paddle.Tensor],
        stage: int,
        *,
        rank: int,
        num_ranks: int,
        meet: Callable[[], None],
    ):
        self.owner = owners({name: int(p.size) for name, p in parameters.items()}, num_ranks)
        self.moves_weights, self.passes, self._rank, self._meet = stage == 3, 0, rank, meet
        self._layers: dict[int, dict[str, paddle.Tensor]] = {}
        for name, parameter in parameters.items():
            if (index := layer_of(name)) is not None:
                self._layers.setdefault(index, {})[name] = parameter
        self.names = {name for layer in self._layers.values() for name in layer}
        self._layers = dict(sorted(self._layers.items()))
        self._first, self._last = min(self._layers, default=None), max(self._layers, default=None)
        self._sums: dict[str, paddle.Tensor] = {}  # of the gradients of this process's own
        self._reached: set[str] = set()
        missing = [name for name in self.names if self.owner[name] == rank and not parameters[name]._is_initialized()]
        assert not missing, f"this process was to load {missing[:3]}"
        for index in self._layers:
            self.release(index)

    # ---- called around a layer

    @paddle.no_grad()
    def fetch(self, index: int) -> None:
        """Let the weights of a layer be here, from their owners."""
        self.passes += index == self._first
        if not self.moves_weights:
            return
        if index == self._first:
            self._meet()
        for name, parameter in self._layers.get(index, {}).items():
            if self.owner[name] == self._rank:
                dist.broadcast(parameter, src=self._rank)
                continue
            value = paddle.empty(parameter.shape, dtype=parameter.dtype)
            dist.broadcast(value, src=self.owner[name])
            value._share_buffer_to(parameter)

    def release(self, index: int) -> None:
        """Free the weights of a layer that others own."""
        if self.moves_weights:
            for name, parameter in self._layers.get(index, {}).items():
                if self.owner[name] != self._rank:
                    parameter._clear_data()

    @paddle.no_grad()
    def collect(self, index: int) -> None:
        """Sum the gradients of a layer over all processes into their owners'."""
        if index == self._last:
            self._meet()
        for name, parameter in self._layers.get(index, {}).items():
            gradient = parameter.grad
            if gradient is not None:
                self._reached.add(name)
            else:
                gradient = paddle.zeros(parameter.shape, dtype=parameter.dtype)
            dist.reduce(gradient, dst=self.owner[name])
            if self.owner[name] == self._rank and name in self._sums:
                self._sums[name].add_(gradient)
            elif self.owner[name] == self._rank:
                self._sums[name] = paddle.empty_like(gradient)
                gradient._share_buffer_to(self._sums[name])  # which outlives the parameter's gradient
            parameter.clear_gradient(False)

    # ---- called around passes and steps

    def idle(self, *, backward: bool) -> None:
        """Take part in a pass of the others without one of one's own."""
        for index in self._layers:
            self.fetch(index)
            self.release(index)
        for index in reversed(self._layers) if backward else ():
            self.fetch(index)
            self.collect(index)
            self.release(index)

    def end_step(self) -> set[str]:
        """Give this process's own parameters the gradients of the step; the names that a backward pass here reached."""
        for layer in self._layers.values():
            for name, parameter in layer.items():
                if self.owner[name] == self._rank:
                    parameter.grad = self._sums[name]
        reached, self._reached, self._sums = self._reached, set(), {}
        return reached

    def host_copy(self, parameters: Mapping[str, paddle.Tensor], *, wanted: bool) -> dict[str, np.ndarray]:
        """Copies of all parameters on the host, where they are wanted; a layer at a time. Collective."""
        copies: dict[str, np.ndarray] = {}
        for index, layer in self._layers.items():
            self.fetch(index)
            if wanted:
                copies.update({name: p.numpy() for name, p in layer.items()})
            self.release(index)
        if not wanted:
            return {}
        return {name: copies[name] if name in copies else p.numpy() for name, p in parameters.items()}
