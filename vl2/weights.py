"""Official checkpoint layout <-> this model's parameters: names, transposition, stacked experts, safetensors files.

Module paths follow the checkpoint, so the conversion is three rules: a Linear weight is transposed ([out, in] there,
[in, out] here), the experts of a layer are stacked, everything else is equal. 16-bit floats are handled as their bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paddle
from paddle import nn
from paddle.base.framework import EagerParamBase

from vl2.config import VL2Config
from vl2.linear import Linear
from vl2.model import DeepseekVL2
from vl2.tokenizer import Tokenizer

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PDPARAMS_FILE = "model_state.pdparams"  # PaddleNLP's name of old
MAX_SHARD_BYTES = 5 * 10**9

# safetensors name -> numpy type that holds its bits
_NUMPY_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "F64": np.float64, "I64": np.int64}
_PADDLE_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FILE_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


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
    entries = {name: (_FILE_TYPES[dtypes[name]], array.shape) for name, array in tensors.items()}
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


def official_parts(model: nn.Layer) -> Iterator[tuple[str, list[Part]]]:
    """For every parameter of the model its path and the official tensors it is made of.

    language.model.layers.1.mlp.experts.gate_up [E, D, 2I]
        -> ...experts.0.gate_proj.weight [I, D] at [0, :, :I] transposed, ...experts.0.up_proj.weight at [0, :, I:], ...
    """
    linear = {f"{path}.weight" for path, layer in model.named_sublayers() if isinstance(layer, Linear)}
    for path, parameter in model.named_parameters():
        if path.endswith(".experts.gate_up"):
            prefix, inner = path.removesuffix(".gate_up"), parameter.shape[2] // 2
            halves = (("gate_proj", slice(None, inner)), ("up_proj", slice(inner, None)))
            yield (
                path,
                [
                    Part(f"{prefix}.{e}.{name}.weight", (e, slice(None), half), True)
                    for e in range(parameter.shape[0])
                    for name, half in halves
                ],
            )
        elif path.endswith(".experts.down"):
            prefix = path.removesuffix(".down")
            yield path, [Part(f"{prefix}.{e}.down_proj.weight", (e,), True) for e in range(parameter.shape[0])]
        else:
            yield path, [Part(path, (), path in linear)]


def _part_shape(shape: list[int], part: Part) -> tuple[int, ...]:
    piece = np.broadcast_to(np.empty(()), shape)[part.at]  # no memory: strides of zero
    return tuple(reversed(piece.shape)) if part.transposed else tuple(piece.shape)


def official_shapes(model: nn.Layer) -> dict[str, tuple[int, ...]]:
    """Official name -> shape ([out, in]) of every tensor of a model, with or without memory for its weights."""
    shapes = {path: parameter.shape for path, parameter in model.named_parameters()}
    return {part.name: _part_shape(shapes[path], part) for path, parts in official_parts(model) for part in parts}


def check_tensors(model: nn.Layer, stored: Mapping[str, StoredTensor], where: str) -> None:
    """Every official tensor there, none besides, each of the model's shape.

    Raises:
        ValueError: listing missing, unknown and wrongly shaped names.
    """
    expected = official_shapes(model)
    missing = [name for name in expected if name not in stored]
    extra = [name for name in stored if name not in expected]
    misshaped = [
        f"{name} is {list(stored[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name].shape != shape
    ]
    if missing or extra or misshaped:
        lines = [f"{where}: the weights are not those of the model that config.json describes"]
        for title, names in (("missing", missing), ("unknown", extra), ("wrong shape", misshaped)):
            if names:
                shown = "; ".join(names[:10]) + (f"; and {len(names) - 10} more" if len(names) > 10 else "")
                lines.append(f"  {title} ({len(names)}): {shown}")
        raise ValueError("\n".join(lines))


# ---------------------------------------------------------------- model


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
    owner_path, _, leaf = path.rpartition(".")
    owner = model
    for name in owner_path.split(".") if owner_path else []:
        owner = getattr(owner, name)
    parameter = EagerParamBase.from_tensor(value, trainable=trainable)
    parameter.stop_gradient = not trainable
    owner._parameters[leaf] = parameter


def build_model(config: VL2Config, image_token_id: int) -> DeepseekVL2:
    """The model without memory for its weights: every parameter waits for `set_parameter`."""
    with paddle.LazyGuard():
        return DeepseekVL2(config, image_token_id=image_token_id)


def load_model(
    folder: str | Path,
    *,
    dtype: str = "float32",
    progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> DeepseekVL2:
    """Read a checkpoint in the official layout straight into the model, tensor by tensor; all weights frozen.

    Args:
        folder: config.json, tokenizer and safetensors files.
        dtype: stored precision: float32, bfloat16 or float16.
        progress: wraps the iteration over parameters (a progress bar).

    Returns:
        The model in eval mode. Mark what trains afterwards (`train_parameters`).

    Raises:
        ValueError: when names, shapes or files do not match the config.
    """
    folder = Path(folder)
    config = VL2Config.from_folder(folder)
    tokenizer = Tokenizer.from_folder(folder)
    check_vocabulary(tokenizer, config, str(folder))
    model = build_model(config, tokenizer.image_id)
    stored = checkpoint_tensors(folder)
    check_tensors(model, stored, str(folder))
    shapes = {path: parameter.shape for path, parameter in model.named_parameters()}
    for path, parts in progress(list(official_parts(model))):
        set_parameter(model, path, _assemble(parts, shapes[path], stored, dtype))
    model.eval()
    return model


def _assemble(parts: list[Part], shape: list[int], stored: Mapping[str, StoredTensor], dtype: str) -> paddle.Tensor:
    if len(parts) == 1 and not parts[0].at:
        value = _tensor(stored[parts[0].name])
        value = value.transpose([1, 0]).contiguous() if parts[0].transposed else value
        return value if value.dtype == getattr(paddle, dtype) else value.astype(dtype)
    kinds = {stored[part.name].dtype for part in parts}
    kind = kinds.pop() if len(kinds) == 1 else "F32"
    whole = np.empty(shape, _NUMPY_TYPES[kind])
    for part in parts:
        array = stored[part.name].read() if not kinds else _tensor(stored[part.name]).astype("float32").numpy()
        whole[part.at] = array.T if part.transposed else array
    value = paddle.to_tensor(whole)
    return value if value.dtype == getattr(paddle, dtype) else value.astype(dtype)


def _tensor(stored: StoredTensor) -> paddle.Tensor:
    if stored.dtype not in _PADDLE_TYPES:
        raise ValueError(f"{stored.path}: a weight has type {stored.dtype}; expected F32, F16 or BF16")
    return paddle.to_tensor(stored.read())  # a uint16 array becomes a bfloat16 tensor


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


def save_model(model: nn.Layer, folder: str | Path, *, dtype: str | None = None) -> None:
    """Write a DeepseekVL2 in the official layout.

    Args:
        model: without adapters.
        folder: existing folder.
        dtype: type of the files; by default each parameter's own.
    """
    parameters = dict(model.named_parameters())

    def tensors() -> Iterator[tuple[str, np.ndarray, str]]:
        for path, parts in official_parts(model):
            kind = dtype or str(parameters[path].dtype).removeprefix("paddle.")
            array = parameters[path].astype(kind).numpy()
            for name, piece in official_tensors(path, array, parts):
                yield name, piece, kind

    save_tensors(tensors(), folder)


def save_tensors(tensors: Iterable[tuple[str, np.ndarray, str]], folder: str | Path) -> None:
    """Write a checkpoint's tensors: one file, or above 5 GB shards and their index.

    Args:
        tensors: (official name, values, Paddle's type name); one shard is in memory at a time.
        folder: existing folder.
    """
    folder = Path(folder)
    shard: dict[str, np.ndarray] = {}
    dtypes: dict[str, str] = {}
    shards: list[list[str]] = []
    size = total = 0

    def close() -> None:
        nonlocal size
        write_safetensors(folder / f"shard-{len(shards)}.safetensors", shard, dtypes)
        shards.append(list(shard))
        shard.clear()
        size = 0

    for name, array, kind in tensors:
        if size and size + array.nbytes > MAX_SHARD_BYTES:
            close()
        shard[name], dtypes[name] = array, kind
        size, total = size + array.nbytes, total + array.nbytes
    close()
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / SINGLE_FILE)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):06d}.safetensors"
        (folder / f"shard-{i}.safetensors").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
