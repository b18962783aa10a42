"""A model's parameters, set one by one: no memory before a value, random values, which of them train."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import paddle
from paddle import nn
from paddle.base.framework import EagerParamBase

from vl2.config import VL2Config
from vl2.model import DeepseekVL2
from vl2.quantised import Quantised


def parameter_owner(model: nn.Layer, path: str) -> tuple[nn.Layer, str]:
    """The layer that holds the parameter at `path`, and its name there."""
    *above, leaf = path.split(".")
    for name in above:
        model = getattr(model, name)
    return model, leaf


def set_parameter(model: nn.Layer, path: str, value: paddle.Tensor, *, trainable: bool = False) -> None:
    """Replace the parameter at `path` by `value`, without ever allocating its initial values."""
    owner, leaf = parameter_owner(model, path)
    parameter = EagerParamBase.from_tensor(value, trainable=trainable)
    parameter.stop_gradient = not trainable
    owner._parameters[leaf] = parameter


def set_quantised(model: nn.Layer, path: str, value: Quantised) -> None:
    """Have the parameter at `path`, which has no memory and gets none, multiply by a weight in few bits."""
    owner, leaf = parameter_owner(model, path)
    parameter = owner._parameters[leaf]
    parameter.quantised = value
    parameter.trainable, parameter.stop_gradient = False, True


def build_model(config: VL2Config, image_token_id: int) -> DeepseekVL2:
    """The model without memory for its weights: every parameter waits for `set_parameter`."""
    with paddle.LazyGuard():
        return DeepseekVL2(config, image_token_id=image_token_id)


def train_parameters(model: nn.Layer, names: Iterable[str]) -> None:
    """Make the named parameters trainable, in float32; all others stay as they are."""
    parameters = dict(model.named_parameters())
    for name in names:
        here = parameters[name]._is_initialized()
        value = parameters[name].astype("float32") if here else absent(parameters[name].shape, "float32")
        set_parameter(model, name, value, trainable=True)


def absent(shape: Sequence[int], dtype: str) -> paddle.Tensor:
    """A tensor of a shape and a type without memory, which another process keeps."""
    value = paddle.empty(list(shape), dtype=dtype)
    value._clear_data()
    return value


def initial_kind(path: str, num_dims: int) -> str:
    """How a weight starts: "zeros" (a bias), "ones" (a norm) or "random"."""
    if path.endswith(".bias"):
        return "zeros"
    return "ones" if num_dims == 1 and "norm" in path else "random"


def init_model(config: VL2Config, image_token_id: int, *, seed: int, dtype: str = "float32") -> DeepseekVL2:
    """A model with random weights: normal of `initializer_range`, norms 1, biases 0. A function of the seed alone."""
    model = build_model(config, image_token_id)
    rng = np.random.default_rng(seed)
    for path, parameter in list(model.named_parameters()):
        shape = parameter.shape
        kind = initial_kind(path, len(shape))
        if kind == "random":
            value = rng.standard_normal(shape, np.float32) * np.float32(config.language.initializer_range)
        else:
            value = np.full(shape, 1 if kind == "ones" else 0, np.float32)
        set_parameter(model, path, paddle.to_tensor(value).astype(dtype))
    model.eval()
    return model
