"""Checkpoint layouts <-> this model's parameters: names, transposition, stacked experts, safetensors files.

Module paths follow the checkpoint, so the conversion is three rules: the experts of a layer are stacked, a matrix may
be transposed, everything else is equal. Two layouts hold the same names: the official one ("hf"), whose Linear weights
are [out, in], and PaddleMIX's ("paddle"), whose Linear weights are [in, out] and router [D, E]. 16-bit floats are
handled as their bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import paddle
from paddle import nn
from paddle.base.framework import EagerParamBase

from vl2.config import VL2Config
from vl2.linear import Linear
from vl2.model import DeepseekVL2
from vl2.moe import Router
from vl2.tokenizer import Tokenizer

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PDPARAMS_FILE = "model_state.pdparams"  # PaddleNLP's name of old

Layout = Literal["hf", "paddle"]
# What the `format` of a safetensors file's metadata says of the layout. PaddleNLP writes "np" (and reads no "pd"),
# which says nothing of the orientation: other tools write it, or nothing, into official checkpoints.
FORMATS: dict[str, Layout] = {"pt": "hf", "pd": "paddle"}

# safetensors name -> numpy type that holds its bits
_NUMPY_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64, "I64": np.int64}
_PADDLE_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FILE_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


# ---------------------------------------------------------------- files


class StoredTensor(NamedTuple):
    """Where a tensor lies in a file."""

    path: Path
    dtype: str  # safetensors' name: F32, F16, BF16
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    num_bytes: int

    def read(self) -> np.ndarray:
        """The tensor's values; bfloat16 as its bits in uint16. Read, not mapped: the memory is the caller's alone."""
        flat = np.fromfile(self.path, _NUMPY_TYPES[self.dtype], offset=self.offset, count=int(np.prod(self.shape)))
        return flat.reshape(self.shape)

    def take(self, index: np.ndarray) -> np.ndarray:
        """The values at some flat positions; nothing else is read."""
        return np.memmap(self.path, _NUMPY_TYPES[self.dtype], "r", self.offset, self.shape).reshape(-1)[index]

    def row(self, index: int) -> StoredTensor:
        """The tensor at one first index, without reading it."""
        size = self.num_bytes // self.shape[0]
        return self._replace(shape=self.shape[1:], offset=self.offset + index * size, num_bytes=size)


class MemoryTensor(NamedTuple):
    """A tensor that lies in no file."""

    dtype: str  # safetensors' name: F32, F16, BF16
    array: np.ndarray  # bfloat16 as its bits in uint16

    @property
    def shape(self) -> tuple[int, ...]:
        """As it would lie in a file."""
        return tuple(self.array.shape)

    def read(self) -> np.ndarray:
        """The tensor's values."""
        return self.array

    def take(self, index: np.ndarray) -> np.ndarray:
        """The values at some flat positions."""
        return self.array.reshape(-1)[index]


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Names and places of the tensors of one safetensors file, and its metadata.

    Raises:
        ValueError: when the file is truncated or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path}: {size} bytes, not a whole safetensors file (header of {length} bytes announced)")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path}: its header is not JSON ({error}); not a safetensors file") from error
    tensors, metadata = {}, {}
    try:
        metadata = header.pop("__metadata__", {})
        for name, entry in header.items():
            (start, stop), shape = entry["data_offsets"], tuple(map(int, entry["shape"]))
            tensors[name] = StoredTensor(path, entry["dtype"], shape, 8 + length + start, stop - start)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its header does not describe tensors ({error!r}); no safetensors file") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in _NUMPY_TYPES:
            raise ValueError(f"{path}: {name} has type {tensor.dtype}; expected one of {', '.join(_NUMPY_TYPES)}")
        end = tensor.offset + tensor.num_bytes
        if end > size:
            raise ValueError(f"{path}: {size} bytes, but {name} ends at {end}; the file is truncated")
        if tensor.num_bytes != math.prod(tensor.shape) * np.dtype(_NUMPY_TYPES[tensor.dtype]).itemsize:
            raise ValueError(
                f"{path}: {name} has {tensor.num_bytes} bytes, which do not fill {list(tensor.shape)} of {tensor.dtype}"
            )
    return tensors, metadata


def safetensors_header(entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with: the length of its JSON and the JSON, filled up to a multiple of 8 bytes.

    Args:
        entries: name -> (safetensors' type name, shape), in the order in which the numbers follow.
        metadata: text entries.
    """
    header: dict = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (kind, shape) in entries.items():
        end = offset + math.prod(shape) * np.dtype(_NUMPY_TYPES[kind]).itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, str], metadata=None) -> None:
    """Write one safetensors file.

    Args:
        path: file to write.
        tensors: values; bfloat16 as bits in uint16.
        dtypes: Paddle's type name of each tensor ("float32", "float16", "bfloat16").
        metadata: text entries of the header.
    """
    entries = {name: (FILE_TYPES[dtypes[name]], array.shape) for name, array in tensors.items()}
    header = safetensors_header(entries, metadata or {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        for array in tensors.values():
            # A transposed view would write its base's bytes in the wrong order.
            file.write(np.ascontiguousarray(array).tobytes())


def checkpoint_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder, single file or sharded.

    Raises:
        ValueError: no weights, a missing shard, a file that is not whole, or an index that other shards are meant by.
    """
    index, single, pickled = folder / INDEX_FILE, folder / SINGLE_FILE, folder / PDPARAMS_FILE
    if index.is_file():
        return _sharded_tensors(index)
    if single.is_file():
        return read_header(single)[0]
    if pickled.is_file():
        from vl2.pdparams import locate_arrays  # here: it needs StoredTensor

        return locate_arrays(pickled)
    raise ValueError(f"{folder}: no {SINGLE_FILE}, no {INDEX_FILE} and no {PDPARAMS_FILE} there")


def _sharded_tensors(index: Path) -> dict[str, StoredTensor]:
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = sorted(set(map(str, places.values())))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{index}: expected an index with a weight_map of tensors to files ({error!r})") from error
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(
            f"{index.parent}: {index.name} names shards that are not there: {', '.join(missing)}; fetch them again"
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        found = read_header(index.parent / file)[0]
        wrong = [name for name in found if places.get(name) != file]
        wrong += [name for name, place in places.items() if place == file and name not in found]
        if wrong:
            raise ValueError(
                f"{index.parent / file}: not the shard that {index.name} describes: {len(wrong)} tensors are in one "
                f"and not in the other ({'; '.join(wrong[:5])}); index and shards must come from one checkpoint"
            )
        tensors.update(found)
    return tensors


# ---------------------------------------------------------------- names


class Part(NamedTuple):
    """One official tensor as a piece of a parameter: index into the parameter, then transposed or not."""

    name: str
    at: tuple
    transposed: bool


def official_parts(model: nn.Layer, layout: Layout = "hf") -> Iterator[tuple[str, list[Part]]]:
    """For every parameter of the model its path and the official tensors it is made of.

    language.model.layers.1.mlp.experts.gate_up [E, D, 2I]
        -> ...experts.0.gate_proj.weight [I, D] at [0, :, :I] transposed, ...experts.0.up_proj.weight at [0, :, I:], ...

    Args:
        model: with or without memory for its weights.
        layout: of the files; it decides what is transposed.

    Source: PaddleMIX's paddlemix/models/deepseek_vl2 has the official names; its Linear weights and its router's are
        [in, out], as is all that paddle.nn.Linear holds.
    """
    official = layout == "hf"
    transposed = {
        f"{path}.weight" for path, layer in model.named_sublayers() if isinstance(layer, Linear if official else Router)
    }
    for path, parameter in model.named_parameters():
        if path.endswith(".experts.gate_up"):
            prefix, inner = path.removesuffix(".gate_up"), parameter.shape[2] // 2
            halves = (("gate_proj", slice(None, inner)), ("up_proj", slice(inner, None)))
            yield (
                path,
                [
                    Part(f"{prefix}.{e}.{name}.weight", (e, slice(None), half), official)
                    for e in range(parameter.shape[0])
                    for name, half in halves
                ],
            )
        elif path.endswith(".experts.down"):
            prefix = path.removesuffix(".down")
            yield path, [Part(f"{prefix}.{e}.down_proj.weight", (e,), official) for e in range(parameter.shape[0])]
        else:
            yield path, [Part(path, (), path in transposed)]


def _part_shape(shape: list[int], part: Part) -> tuple[int, ...]:
    piece = np.broadcast_to(np.empty(()), shape)[part.at]  # no memory: strides of zero
    return tuple(reversed(piece.shape)) if part.transposed else tuple(piece.shape)


def official_shapes(model: nn.Layer, layout: Layout = "hf") -> dict[str, tuple[int, ...]]:
    """Official name -> shape as in the files of every tensor of a model, with or without memory for its weights."""
    shapes = {path: parameter.shape for path, parameter in model.named_parameters()}
    pieces = official_parts(model, layout)
    return {part.name: _part_shape(shapes[path], part) for path, parts in pieces for part in parts}


def find_layout(model: nn.Layer, stored: Mapping[str, StoredTensor], where: str) -> Layout:
    """Tell the layout of a checkpoint: by the matrices that are not square, which decide for those that are.

    Without any, by the files' metadata; "np" alone, or a .pdparams, means PaddleNLP, which writes it.

    Raises:
        ValueError: when matrices disagree among themselves or with the metadata.
    """
    shapes = {path: parameter.shape for path, parameter in model.named_parameters()}
    lying: dict[Layout, list[str]] = {"hf": [], "paddle": []}
    for (path, parts), (_, others) in zip(official_parts(model, "hf"), official_parts(model, "paddle")):
        for part, other in zip(parts, others):
            if part.name in stored and part.transposed != other.transposed:
                official, paddles = _part_shape(shapes[path], part), _part_shape(shapes[path], other)
                if official != paddles and stored[part.name].shape in (official, paddles):
                    lying["hf" if stored[part.name].shape == official else "paddle"].append(part.name)
    files = {tensor.path for tensor in stored.values() if tensor.path.suffix == ".safetensors"}
    formats = {read_header(file)[1].get("format", "") for file in files}
    stated = {FORMATS[name] for name in formats if name in FORMATS}
    if lying["hf"] and lying["paddle"]:
        raise ValueError(
            f"{where}: some matrices lie as in the official layout ({len(lying['hf'])}, {lying['hf'][0]} is "
            f"{list(stored[lying['hf'][0]].shape)}), others as in PaddleMIX's ({len(lying['paddle'])}, "
            f"{lying['paddle'][0]} is {list(stored[lying['paddle'][0]].shape)}); a checkpoint must be in one layout"
        )
    found: set[Layout] = {layout for layout, names in lying.items() if names}
    if len(found | stated) > 1:
        seen = f"the shapes of its matrices mean {next(iter(found))}" if found else "its files differ"
        raise ValueError(
            f"{where}: the layout is uncertain: the metadata says format={'/'.join(sorted(formats))}, but {seen} "
            "(expected pt for the official layout, np or pd for PaddleMIX's); square matrices could be read either way"
        )
    if found or stated:
        return next(iter(found | stated))
    return "paddle" if formats <= {"np"} else "hf"  # no format at all: a .pdparams, which Paddle wrote


def check_tensors(model: nn.Layer, stored: Mapping[str, StoredTensor], where: str) -> Layout:
    """Every official tensor there, none besides, each of the model's shape in one of the two layouts.

    Returns:
        The layout.

    Raises:
        ValueError: listing missing, unknown and wrongly shaped names; or see `find_layout`.
    """
    layout = find_layout(model, stored, where)
    expected = official_shapes(model, layout)
    mistyped = [f"{name} is {tensor.dtype}" for name, tensor in stored.items() if tensor.dtype not in _PADDLE_TYPES]
    missing = [name for name in expected if name not in stored]
    extra = [name for name in stored if name not in expected]
    misshaped = [
        f"{name} is {list(stored[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    if missing or extra or misshaped or mistyped:
        lines = [f"{where}: the weights are not those of the model that config.json describes"]
        wrong_type = f"wrong type, expected {', '.join(_PADDLE_TYPES)}"
        for title, names in (
            ("missing", missing),
            ("unknown", extra),
            ("wrong shape", misshaped),
            (wrong_type, mistyped),
        ):
            if names:
                shown = "; ".join(names[:10]) + (f"; and {len(names) - 10} more" if len(names) > 10 else "")
                lines.append(f"  {title} ({len(names)}): {shown}")
        raise ValueError("\n".join(lines))
    return layout


# ---------------------------------------------------------------- model


def parameter_owner(model: nn.Layer, path: str) -> tuple[nn.Layer, str]:
    """The layer that holds the parameter at `path`, and its name there."""
    *above, leaf = path.split(".")
    for name in above:
        model = getattr(model, name)
    return model, leaf


def check_vocabulary(tokenizer: Tokenizer, config: VL2Config, where: str) -> None:
    """Refuse a tokenizer with ids that the embedding has no row for.

    Raises:
        ValueError: with both numbers.
    """
    if len(tokenizer) > config.language.vocab_size:
        raise ValueError(
            f"{where}: the tokenizer has {len(tokenizer)} entries, but language_config.vocab_size is "
            f"{config.language.vocab_size}; tokenizer.json and config.json must belong together"
        )


def set_parameter(model: nn.Layer, path: str, value: paddle.Tensor, *, trainable: bool = False) -> None:
    """Replace the parameter at `path` by `value`, without ever allocating its initial values."""
    owner, leaf = parameter_owner(model, path)
    parameter = EagerParamBase.from_tensor(value, trainable=trainable)
    parameter.stop_gradient = not trainable
    owner._parameters[leaf] = parameter


def build_model(config: VL2Config, image_token_id: int) -> DeepseekVL2:
    """The model without memory for its weights: every parameter waits for `set_parameter`."""
    with paddle.LazyGuard():
        return DeepseekVL2(config, image_token_id=image_token_id)


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
                found[inside] = cast(np.ascontiguousarray(bits), tensor.dtype, "F32")
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
        ValueError: when names, shapes or files do not match the config.
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
            name: MemoryTensor(FILE_TYPES[dtype], piece)
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
        ValueError: when names, shapes or files do not match the config.
    """
    stored = open_model(folder)
    for path in progress(list(stored.parts)):
        set_parameter(stored.skeleton, path, stored.parameter(path, dtype))
    stored.skeleton.eval()
    return stored.skeleton


def _assemble(
    parts: list[Part], shape: list[int], stored: Mapping[str, StoredTensor | MemoryTensor], dtype: str | None
) -> paddle.Tensor:
    if len(parts) == 1 and not parts[0].at:
        value = _tensor(stored[parts[0].name])
        value = value.transpose([1, 0]).contiguous() if parts[0].transposed else value
        return _as_type(value, dtype)
    kinds = {stored[part.name].dtype for part in parts}
    kind = kinds.pop() if len(kinds) == 1 else "F32"
    whole = np.empty(shape, _NUMPY_TYPES[kind])
    for part in parts:
        array = stored[part.name].read() if not kinds else _tensor(stored[part.name]).astype("float32").numpy()
        whole[part.at] = array.T if part.transposed else array
    return _as_type(paddle.to_tensor(whole), dtype)


def _as_type(value: paddle.Tensor, dtype: str | None) -> paddle.Tensor:
    return value if dtype is None or value.dtype == getattr(paddle, dtype) else value.astype(dtype)


def _tensor(stored: StoredTensor | MemoryTensor) -> paddle.Tensor:
    return paddle.to_tensor(stored.read())  # a uint16 array becomes a bfloat16 tensor


def cast(bits: np.ndarray, dtype: str, target: str) -> np.ndarray:
    """Values of one type rounded to another (to the nearest, ties to even); types by safetensors' names, as bits."""
    if dtype == target:
        return bits
    if target == "F16":  # not by Paddle, whose float16 of 1e-24 is 4e-5 on CPU
        with np.errstate(over="ignore"):
            return cast(bits, dtype, "F32").astype(np.float16)
    return paddle.to_tensor(bits, place=paddle.CPUPlace()).astype(_PADDLE_TYPES[target]).numpy()


def train_parameters(model: nn.Layer, names: Iterable[str]) -> None:
    """Make the named parameters trainable, in float32; all others stay as they are."""
    parameters = dict(model.named_parameters())
    for name in names:
        set_parameter(model, name, parameters[name].astype("float32"), trainable=True)


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


def official_tensors(path: str, value: np.ndarray, parts: list[Part]) -> Iterator[tuple[str, np.ndarray]]:
    """Cut one parameter's values into its official tensors, in the official orientation (contiguous)."""
    for part in parts:
        piece = value[part.at]
        yield part.name, np.ascontiguousarray(piece.T if part.transposed else piece)
