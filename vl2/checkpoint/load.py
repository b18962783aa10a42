"""Reads a checkpoint in either layout into a model, tensor by tensor."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

from vl2.checkpoint.model_folder import ModelFolder, open_folder
from vl2.model import DeepseekVL2
from vl2.parameters import build_model, set_parameter

_SCRATCH_BYTES = 500_000_000  # of weights, after which what reading them freed is given back


def load_model(
    folder: str | Path | ModelFolder,
    *,
    dtype: str = "float32",
    done: Callable[[int], object] = lambda num_bytes: None,
) -> DeepseekVL2:
    """Read a checkpoint in either layout straight into the model, tensor by tensor; all weights frozen.

    Args:
        folder: of the model, or what was opened of it already.
        dtype: type that the weights get: float32, bfloat16 or float16.
        done: told the bytes of each parameter that is in place (a progress bar).

    Returns:
        The model in eval mode. Mark what trains afterwards (`train_parameters`).

    Raises:
        UserError: when names, shapes or files do not match the config.
    """
    opened = folder if isinstance(folder, ModelFolder) else open_folder(folder)
    weights, scratch = opened.weights, 0
    model = build_model(opened.config, opened.tokenizer.image_id)
    for path in weights.parts:
        value = weights.parameter(path, dtype)
        set_parameter(model, path, value)
        num_bytes = value.size * value.element_size()
        done(num_bytes)
        scratch += num_bytes
        if scratch > _SCRATCH_BYTES:
            give_back_freed_memory()
            scratch = 0
    model.eval()
    return model


def give_back_freed_memory() -> None:
    """Return freed memory to the system, also from the middle of the heap; does nothing where libc is not glibc.

    launch.sh has glibc keep freed memory, which makes training steps faster. What reading a checkpoint frees lies
    between the weights, where nothing as large comes again: 1.9 GB of VL2-Tiny's 9.6 GB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)
