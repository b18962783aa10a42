"""PiSSA's start of an adapter: A and B hold the principal singular values and vectors of the weight they add to.

The base stays as it is: what an adapter adds is how far A @ B has moved since (vl2.lora_layers.addition), which is the
same function as PEFT's and PaddleNLP's W - A0 @ B0 in the place of W, but exact at the start in any precision.

Source: Meng et al., PiSSA (arXiv 2404.02948); Halko et al., randomised subspace iteration (arXiv 0909.4061).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import paddle
from paddle import nn

from vl2.lora import VL2LoRAModel, lora_layers
from vl2.lora_layers import LoRALinear
from vl2.parameters import parameter_owner

# More columns than the rank, and passes over the weight: PiSSA's authors found 16 passes as good as a full SVD. A full
# SVD of all of Small's experts would take hours where this takes minutes.
_SPARE_COLUMNS, _PASSES = 8, 8


def start_from_principal(
    lora_model: VL2LoRAModel, *, seed: int, done: Callable[[int], object] = lambda matrices: None
) -> None:
    """Set every A and B, and where they started, from the weight that they add to.

    Args:
        lora_model: with settings.pissa; its base has its weights.
        seed: the result depends on (seed, the weight's name, the weight), up to the last digits.
        done: told how many matrices were decomposed.
    """
    for path, layer in lora_layers(lora_model.model):
        if isinstance(layer, LoRALinear):
            a, b = principal_factors(_float32(layer.weight), layer.r, layer.scaling, _generator(seed, path))
            _set(layer, "lora", a, b)
            done(1)
            continue
        experts, inner = _module(lora_model.model, path), layer.gate_B.shape[-1]
        halves = (
            ("gate", experts.gate_up, slice(None, inner)),
            ("up", experts.gate_up, slice(inner, None)),
            ("down", experts.down, slice(None)),
        )
        for part, stacked, columns in halves:
            rank, generator = getattr(layer, f"{part}_A").shape[-1], _generator(seed, f"{path}.{part}")
            pairs = []
            for expert in range(stacked.shape[0]):
                weight = _float32(stacked[expert])[:, columns]
                pairs.append(principal_factors(weight, rank, layer.scaling, generator))
                done(1)
            _set(layer, part, *map(np.stack, zip(*pairs)))


def principal_factors(
    weight: np.ndarray, rank: int, scaling: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A and B whose product, times the scaling, is the nearest matrix of a rank to a weight.

    weight = U S V    ->    A = U[:, :r] sqrt(S[:r] / scaling)    B = sqrt(S[:r] / scaling) V[:r]

    Args:
        weight: float32 [in, out].
        rank: r, at most the smaller side.
        scaling: of the product.
        generator: of the directions that the search starts in.

    Returns:
        float32 [in, r] and [r, out].
    """
    size, out = weight.shape
    columns = min(rank + _SPARE_COLUMNS, size, out)
    basis = weight @ generator.standard_normal((out, columns), np.float32)
    for _ in range(_PASSES):
        basis = weight @ np.linalg.qr(weight.T @ np.linalg.qr(basis)[0])[0]
    basis = np.linalg.qr(basis)[0]
    left, values, right = np.linalg.svd(basis.T @ weight, full_matrices=False)
    root = np.sqrt(values[:rank] / np.float32(scaling))
    return np.ascontiguousarray(basis @ left[:, :rank] * root), np.ascontiguousarray(root[:, None] * right[:rank])


def _set(layer: nn.Layer, part: str, a: np.ndarray, b: np.ndarray) -> None:
    for letter, value in (("A", a), ("B", b)):
        getattr(layer, f"{part}_{letter}").set_value(value)
        getattr(layer, f"{part}_{letter}_start").set_value(value)


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def _float32(weight: paddle.Tensor) -> np.ndarray:
    return weight.astype("float32").numpy()


def _module(model: nn.Layer, path: str) -> nn.Layer:
    owner, leaf = parameter_owner(model, path)
    return getattr(owner, leaf)
