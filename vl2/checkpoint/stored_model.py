"""A model's weights where they lie, in files or in memory, seen as the model's parameters; read when asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from vl2.checkpoint.folder import Checkpoint
from vl2.checkpoint.layouts import Layout, Part, check_tensors, official_parts, official_tensors
from vl2.checkpoint.tensor_files import MemoryTensor, StoredTensor, cast
from vl2.dtypes import bits_type
from vl2.model import DeepseekVL2
from vl2.parameters import build_model
from vl2.weight_kernels import widen_transposed


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A checkpoint whose every name and shape fits its config; values stay in the files until they are asked for."""

    folder: Path
    skeleton: DeepseekVL2  # without memory for its weights, and to stay so
    checkpoint: Checkpoint | None  # its files; None in memory
    layout: Layout
    tensors: Mapping[str, StoredTensor | MemoryTensor]  # by official name
    parts: Mapping[str, list[Part]]  # by parameter path, in the model's order, oriented as in the files
    shapes: Mapping[str, list[int]]  # of the parameters

    def parameter(self, path: str, dtype: str | None = None) -> paddle.Tensor:
        """One parameter's value in the model's orientation and stacking, in `dtype` or as it is stored."""
        return _assemble(self.parts[path], self.shapes[path], self.tensors, dtype)

    def matrix(self, path: str, index: int, dtype: str) -> np.ndarray:
        """One matrix of a parameter, rounded to a type, as float32 [in, out]; the others of a stack are not read.

        Args:
            path: of a matrix, or of a stack of them.
            index: which one of a stack; else 0.
            dtype: that it is rounded to.
        """
        shape = self.shapes[path]
        out = np.empty(shape[-2:], np.float32)
        for part in self.parts[path]:
            if part.at and part.at[0] != index:
                continue
            tensor, piece = self.tensors[part.name], out[part.at[1:]]
            bits = cast(tensor.read(), tensor.dtype, dtype)
            if dtype == "bfloat16" and part.transposed:
                widen_transposed(bits, piece.view(np.uint32))
                continue
            values = cast(bits, dtype, "float32")
            piece[...] = values.T if part.transposed else values
        return out

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


def find_weights(folder: Path, model: DeepseekVL2, checkpoint: Checkpoint) -> StoredModel:
    """The weights of a checkpoint as a model's parameters.

    Args:
        folder: for errors.
        model: without memory for its weights.
        checkpoint: files in either layout.

    Raises:
        UserError: when names, shapes or types do not fit the model.
    """
    layout = check_tensors(model, checkpoint, str(folder))
    return StoredModel(
        folder=folder,
        skeleton=model,
        checkpoint=checkpoint,
        layout=layout,
        tensors=checkpoint.tensors,
        parts=dict(official_parts(model, layout)),
        shapes={path: list(parameter.shape) for path, parameter in model.named_parameters()},
    )


def hold_model(folder: Path, model: DeepseekVL2, dtype: str) -> StoredModel:
    """A model in memory as `find_weights` shows one in files; for random weights, which lie in none.

    Args:
        folder: with its config and tokenizer.
        model: the values; not changed.
        dtype: their type.
    """
    values, parts = dict(model.named_parameters()), dict(official_parts(model))
    return StoredModel(
        folder=folder,
        skeleton=build_model(model.config, model.image_token_id),
        checkpoint=None,
        layout="hf",
        tensors={
            name: MemoryTensor(dtype, piece)
            for path, pieces in parts.items()
            for name, piece in official_tensors(path, values[path].astype(dtype).numpy(), pieces)
        },
        parts=parts,
        shapes={path: list(value.shape) for path, value in values.items()},
    )


def _assemble(
    parts: list[Part], shape: list[int], stored: Mapping[str, StoredTensor | MemoryTensor], dtype: str | None
) -> paddle.Tensor:
    if len(parts) == 1 and not parts[0].at:
        value = _tensor(stored[parts[0].name])
        value = value.transpose([1, 0]).contiguous() if parts[0].transposed else value
        return _as_type(value, dtype)
    kinds = {stored[part.name].dtype for part in parts}
    kind = dtype or (kinds.pop() if len(kinds) == 1 else "float32")
    whole = np.empty(shape, bits_type(kind))
    for part in parts:
        one = stored[part.name]
        # Rounded one by one: all experts of a layer in float32 are twice what the model takes of them.
        array = one.read() if one.dtype == kind else _tensor(one).astype(kind).numpy()
        whole[part.at] = array.T if part.transposed else array
    return paddle.to_tensor(whole)


def _as_type(value: paddle.Tensor, dtype: str | None) -> paddle.Tensor:
    return value if dtype is None or value.dtype == getattr(paddle, dtype) else value.astype(dtype)


def _tensor(stored: StoredTensor | MemoryTensor) -> paddle.Tensor:
    return paddle.to_tensor(stored.read())  # a uint16 array becomes a bfloat16 tensor
