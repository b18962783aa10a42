"""Reads a checkpoint in either layout into a model, tensor by tensor."""

from __future__ import annotations

import ctypes
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path

from paddle import nn

from vl2.checkpoint.model_folder import ModelFolder, open_folder
from vl2.checkpoint.quantised import QuantisedReader
from vl2.checkpoint.stored_model import StoredModel
from vl2.dtypes import item_bytes
from vl2.model import DeepseekVL2
from vl2.parameters import absent, build_model, set_parameter, set_quantised
from vl2.quantised import kept_in

logger = logging.getLogger(__name__)

TOWER = "vision."  # begins the paths of its parameters
_SCRATCH_BYTES = 500_000_000  # of weights, after which what reading them freed is given back


def load_model(
    folder: str | Path | ModelFolder,
    *,
    dtype: str = "float32",
    keep: Callable[[str], bool] = lambda path: True,
    done: Callable[[int], object] = lambda num_bytes: None,
    tower: bool = True,
    frozen: str = "none",
    frozen_cache: Path | None = None,
    trains: Callable[[str], bool] = lambda path: False,
) -> DeepseekVL2:
    """Read a checkpoint in either layout straight into the model, tensor by tensor; all weights frozen.

    Args:
        folder: of the model, or what was opened of it already.
        dtype: type that the weights get: float32, bfloat16 or float16.
        keep: whether to read a parameter; the others stay without memory.
        done: told the bytes of each parameter that is in place (a progress bar).
        tower: False leaves the vision tower out until it is called.
        frozen: "nf4" or "int8": matrices are kept in few bits, see `vl2.quantised`.
        frozen_cache: folder for what comes of that, which later starts read; None: it is not kept.
        trains: whether a parameter will train, and is needed whole.

    Returns:
        The model in eval mode. Mark what trains afterwards (`train_parameters`).

    Raises:
        UserError: when names, shapes or files do not match the config; a weight to quantise is not finite.
    """
    opened = folder if isinstance(folder, ModelFolder) else open_folder(folder)
    weights, scratch = opened.weights, 0
    model = build_model(opened.config, opened.tokenizer.image_id)
    if not tower:
        _load_when_called(model, weights, dtype, frozen)
    quantised = None if frozen == "none" else QuantisedReader(weights, frozen, dtype, frozen_cache)
    for path in weights.parts:
        if path.startswith(TOWER) and not tower:
            continue
        num_bytes = math.prod(weights.shapes[path]) * item_bytes(dtype)
        if quantised and kept_in(path, frozen) != "none" and not trains(path):
            set_quantised(model, path, quantised.read(path))
        elif keep(path):
            set_parameter(model, path, weights.parameter(path, dtype))
        else:
            set_parameter(model, path, absent(weights.shapes[path], dtype))
            continue
        done(num_bytes)
        scratch += num_bytes
        if scratch > _SCRATCH_BYTES:
            give_back_freed_memory()
            scratch = 0
    if quantised:
        quantised.close()
    model.eval()
    return model


def _load_when_called(model: DeepseekVL2, weights: StoredModel, dtype: str, frozen: str) -> None:
    """Have the vision tower read its weights before its first call."""
    for parameter in model.vision.parameters():
        parameter.trainable, parameter.stop_gradient = False, True

    def read(layer: nn.Layer, inputs: object) -> None:
        hook.remove()
        logger.warning("a picture is not in the vision cache: the vision tower is loaded after all")
        quantised = None if frozen == "none" else QuantisedReader(weights, frozen, dtype)
        for path in weights.parts:
            if not path.startswith(TOWER):
                continue
            if quantised and kept_in(path, frozen) != "none":
                set_quantised(model, path, quantised.read(path))
            else:
                set_parameter(model, path, weights.parameter(path, dtype))
        if quantised:
            quantised.close()

    hook = model.vision.register_forward_pre_hook(read)


def give_back_freed_memory() -> None:
    """Return freed memory to the system, also from the middle of the heap; does nothing where libc is not glibc.

    launch.sh has glibc keep freed memory, which makes training steps faster. What reading a checkpoint frees lies
    between the weights, where nothing as large comes again: 1.9 GB of VL2-Tiny's 9.6 GB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)
