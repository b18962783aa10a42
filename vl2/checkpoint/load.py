"""A model's weights: read from a checkpoint in either layout, made at random, or left in the files until asked for."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from vl2.checkpoint.folder import checkpoint_tensors
from vl2.checkpoint.layouts import Layout, Part, check_tensors, official_parts, official_tensors
from vl2.checkpoint.tensor_files import MemoryTensor, StoredTensor, cast
from vl2.config import VL2Config
from vl2.dtypes import bits_type
from vl2.errors import UserError
from vl2.model import DeepseekVL2
from vl2.parameters import build_model, set_parameter
from vl2.tokenizer import Tokenizer

_SCRATCH_BYTES = 500_000_000  # of weights, after which what reading them freed is given back


def check_vocabulary(tokenizer: Tokenizer, config: VL2Config, where: str) -> None:
    """Refuse a tokenizer with ids that the embedding has no row for.

    Raises:
        UserError: with both numbers.
    """
    if len(tokenizer) > config.language.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {len(tokenizer)} entries, but language_config.vocab_size is "
            f"{config.language.vocab_size}; tokenizer.json and config.json must belong together"
        )


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A checkpoint whose every name and shape fits its config; values stay in the files until they are asked for."""

    folder: Path
    skeleton: DeepseekVL2  # without memory for its weights
    layout: Layout
    tensors: Mapping[str, StoredTensor | MemoryTensor]  # by official name
    parts: Mapping[str, list[Part]]  # by parameter path, in the model's order, oriented as in the files
    shapes: Mapping[str, list[int]]  # of the parameters

    def parameter(self, path: str, dtype: str | None = None) -> paddle.Tensor:
        """One parameter's value in the model's orientation and stacking, in `dtype` or as it is stored."""
        return _assemble(self.parts[path], self.shapes[path], self.tensors, dtype)

    def numbers(self, path: str, index: np.ndarray) -> np.ndarray:
        """Some numbers of a parameter as float32, reading only these.

        Args:
            path: of the parameter.
            index: int64 positions in the flattened parameter.
        """
        shape = self.shapes[path]
        at, found = np.unravel_index(index, shape), np.empty(len(index), np.float32)
        for part in self.parts[path]:
            inside, place = np.ones(len(index), bool), []
            for axis, position in enumerate(at):
                pick = part.at[axis] if axis < len(part.at) else slice(None)
                if isinstance(pick, slice):
                    start, stop, _ = pick.indices(shape[axis])
                    inside &= (position >= start) & (position < stop)
                    place.append(position - start)
                else:
                    inside &= position == pick
            if inside.any():
                tensor = self.tensors[part.name]
                local = [position[inside] for position in (reversed(place) if part.transposed else place)]
                bits = tensor.take(np.ravel_multi_index(tuple(local), tensor.shape))
                found[inside] = cast(np.ascontiguousarray(bits), tensor.dtype, "float32")
        return found

    def named_parts(self) -> Iterator[tuple[str, Part]]:
        """(path of the parameter, official tensor of it), in the model's order."""
        for path, parts in self.parts.items():
            for part in parts:
                yield path, part

    def piece(self, part: Part) -> np.ndarray:
        """The bits of one official tensor, oriented as its parameter."""
        array = self.tensors[part.name].read()
        return array.T if part.transposed else array


def open_model(folder: str | Path) -> StoredModel:
    """Look at a checkpoint without reading its weights.

    Raises:
        UserError: when names, shapes or files do not match the config.
    """
    folder = Path(folder)
    config, tokenizer = VL2Config.from_folder(folder), Tokenizer.from_folder(folder)
    check_vocabulary(tokenizer, config, str(folder))
    model = build_model(config, tokenizer.image_id)
    stored = checkpoint_tensors(folder)
    layout = check_tensors(model, stored, str(folder))
    return StoredModel(
        folder=folder,
        skeleton=model,
        layout=layout,
        tensors=stored,
        parts=dict(official_parts(model, layout)),
        shapes={path: list(parameter.shape) for path, parameter in model.named_parameters()},
    )


def hold_model(folder: Path, model: DeepseekVL2, dtype: str) -> StoredModel:
    """A model in memory as `open_model` shows one in files; for random weights, which lie in none.

    Args:
        folder: with its config and tokenizer.
        model: the values; not changed.
        dtype: their type.
    """
    values, parts = dict(model.named_parameters()), dict(official_parts(model))
    return StoredModel(
        folder=folder,
        skeleton=build_model(model.config, model.image_token_id),
        layout="hf",
        tensors={
            name: MemoryTensor(dtype, piece)
            for path, pieces in parts.items()
            for name, piece in official_tensors(path, values[path].astype(dtype).numpy(), pieces)
        },
        parts=parts,
        shapes={path: list(value.shape) for path, value in values.items()},
    )


def load_model(
    folder: str | Path,
    *,
    dtype: str = "float32",
    progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> DeepseekVL2:
    """Read a checkpoint in either layout straight into the model, tensor by tensor; all weights frozen.

    Args:
        folder: config.json, tokenizer and safetensors files.
        dtype: stored precision: float32, bfloat16 or float16.
        progress: wraps the iteration over parameters (a progress bar).

    Returns:
        The model in eval mode. Mark what trains afterwards (`train_parameters`).

    Raises:
        UserError: when names, shapes or files do not match the config.
    """
    stored, scratch = open_model(folder), 0
    for path in progress(list(stored.parts)):
        value = stored.parameter(path, dtype)
        set_parameter(stored.skeleton, path, value)
        scratch += value.size * value.element_size()
        if scratch > _SCRATCH_BYTES:
            give_back_freed_memory()
            scratch = 0
    stored.skeleton.eval()
    return stored.skeleton


def give_back_freed_memory() -> None:
    """Return freed memory to the system, also from the middle of the heap; does nothing where libc is not glibc.

    launch.sh has glibc keep freed memory, which makes training steps faster. What reading a checkpoint frees lies
    between the weights, where nothing as large comes again: 1.9 GB of VL2-Tiny's 9.6 GB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def _assemble(
    parts: list[Part], shape: list[int], stored: Mapping[str, StoredTensor | MemoryTensor], dtype: str | None
) -> paddle.Tensor:
    if len(parts) == 1 and not parts[0].at:
        value = _tensor(stored[parts[0].name])
        value = value.transpose([1, 0]).contiguous() if parts[0].transposed else value
        return _as_type(value, dtype)
    kinds = {stored[part.name].dtype for part in parts}
    kind = kinds.pop() if len(kinds) == 1 else "float32"
    whole = np.empty(shape, bits_type(kind))
    for part in parts:
        array = stored[part.name].read() if not kinds else _tensor(stored[part.name]).astype("float32").numpy()
        whole[part.at] = array.T if part.transposed else array
    return _as_type(paddle.to_tensor(whole), dtype)


def _as_type(value: paddle.Tensor, dtype: str | None) -> paddle.Tensor:
    return value if dtype is None or value.dtype == getattr(paddle, dtype) else value.astype(dtype)


def _tensor(stored: StoredTensor | MemoryTensor) -> paddle.Tensor:
    return paddle.to_tensor(stored.read())  # a uint16 array becomes a bfloat16 tensor
