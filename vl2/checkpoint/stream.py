"""A model whose layers read their weights when they are called and forget them afterwards.

For computing with a model that does not fit into memory, or with several versions of one: a pass holds one layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paddle
from paddle import nn
from paddle.nn.layer.layers import HookRemoveHelper

from vl2.model import DeepseekVL2
from vl2.parameters import parameter_owner, set_parameter

# In every checkpoint, computed with by no model.
_UNUSED = "vision.attn_pool."


def stream_weights(model: DeepseekVL2, value_of: Callable[[str], paddle.Tensor]) -> Callable[[], None]:
    """Have a model without weights read them while it computes.

    Args:
        model: from `vl2.parameters.build_model`, possibly with LoRA layers added; changed in place. Only for inference:
            nothing would be there for a backward pass.
        value_of: gives a parameter's value by its path, in the model's orientation; called in each forward pass again,
            except for the few small parameters outside of layers.

    Returns:
        What ends it, and leaves the layers without their weights.
    """
    inner = model.language.model
    streamed = {
        "language.model.embed_tokens": inner.embed_tokens,
        "language.lm_head": model.language.lm_head,
        "projector": model.projector,
        **{f"language.model.layers.{i}": layer for i, layer in enumerate(inner.layers)},
        **{f"vision.blocks.{i}": block for i, block in enumerate(model.vision.blocks)},
    }
    waiting = {path: p for path, p in model.named_parameters() if not p._is_initialized()}
    hooks: list[HookRemoveHelper] = []
    for prefix, layer in streamed.items():
        paths = [path for path in waiting if path.startswith(f"{prefix}.")]
        hooks += _stream(model, layer, {path: waiting.pop(path) for path in paths}, value_of)
    for path in waiting:
        if not path.startswith(_UNUSED):
            set_parameter(model, path, value_of(path))

    def stop() -> None:
        for hook in hooks:
            hook.remove()

    return stop


def _stream(
    model: DeepseekVL2, layer: nn.Layer, empty: dict[str, paddle.Tensor], value_of: Callable[[str], paddle.Tensor]
) -> list[HookRemoveHelper]:
    def read(layer: nn.Layer, inputs: Any) -> None:
        for path in empty:
            set_parameter(model, path, value_of(path))

    def forget(layer: nn.Layer, inputs: Any, outputs: Any) -> None:
        for path, parameter in empty.items():
            owner, leaf = parameter_owner(model, path)
            owner._parameters[leaf] = parameter

    return [layer.register_forward_pre_hook(read), layer.register_forward_post_hook(forget)]
