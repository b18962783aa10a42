"""Fingerprints that tell models and fine-tunes apart without reading all their numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import paddle
from paddle import nn

from vl2.checkpoint.stored_model import StoredModel

_PROBES = 64  # numbers taken of each weight


def model_fingerprint(model: nn.Layer) -> str:
    """sha256 hex of a model's config, and of names, shapes and evenly spaced numbers of its weights.

    A probe, so that 55 GB need not be read twice: it tells models and fine-tunes apart, not a flipped bit.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, parameter in model.named_parameters():
        flat, index = parameter.detach().reshape([-1]), paddle.to_tensor(_probed(parameter.shape))
        if parameter.dtype == paddle.float16:  # has no gather on CPU; its bits have
            values = paddle.gather(flat.view("int16"), index).view("float16").astype("float32")
        else:
            values = paddle.gather(flat, index).astype("float32")
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def stored_fingerprint(stored: StoredModel, dtype: str) -> str:
    """`model_fingerprint` of a checkpoint as it would be loaded in `dtype`, reading only the numbers it takes."""
    digest = hashlib.sha256(json.dumps(stored.skeleton.config.to_dict(), sort_keys=True).encode())
    for path, shape in stored.shapes.items():
        _update(digest, stored, path, shape, dtype)
    return digest.hexdigest()


def vision_fingerprint(stored: StoredModel, dtype: str, *, projected: bool) -> str:
    """sha256 hex of what decides the numbers of a checkpoint's vision tower, as it would be loaded in `dtype`.

    Args:
        projected: of the projector's too.
    """
    config, prefixes = stored.skeleton.config, ("vision.", "projector.") if projected else ("vision.",)
    sizes = [asdict(config.vision), *([asdict(config.projector)] if projected else [])]
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
    for path, shape in stored.shapes.items():
        if path.startswith(prefixes):
            _update(digest, stored, path, shape, dtype)
    return digest.hexdigest()


def _update(digest: hashlib._Hash, stored: StoredModel, path: str, shape: Sequence[int], dtype: str) -> None:
    rounded = paddle.to_tensor(stored.numbers(path, _probed(shape))).astype(dtype).astype("float32")
    digest.update(f"{path}{list(shape)}".encode())
    digest.update(rounded.numpy().tobytes())


def _probed(shape: Sequence[int]) -> np.ndarray:
    """Evenly spaced positions in a flattened weight."""
    size = int(np.prod(shape))
    return np.unique(np.linspace(0, size - 1, min(size, _PROBES)).astype("int64"))
