"""Tensors in files: where each lies in a checkpoint, safetensors read and written, one type rounded to another.

16-bit floats are handled as their bits. Knows nothing of the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paddle

from vl2.dtypes import DTYPE_OF_SAFETENSORS, bits_type, item_bytes, safetensors_name
from vl2.errors import UserError


class StoredTensor(NamedTuple):
    """Where a tensor lies in a file."""

    path: Path
    dtype: str  # Paddle's name
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    num_bytes: int

    def read(self) -> np.ndarray:
        """The tensor's values; bfloat16 as its bits in uint16. Read, not mapped: the memory is the caller's alone."""
        flat = np.fromfile(self.path, bits_type(self.dtype), offset=self.offset, count=int(np.prod(self.shape)))
        return flat.reshape(self.shape)

    def take(self, index: np.ndarray) -> np.ndarray:
        """The values at some flat positions; nothing else is read."""
        return np.memmap(self.path, bits_type(self.dtype), "r", self.offset, self.shape).reshape(-1)[index]

    def row(self, index: int) -> StoredTensor:
        """The tensor at one first index, without reading it."""
        size = self.num_bytes // self.shape[0]
        return self._replace(shape=self.shape[1:], offset=self.offset + index * size, num_bytes=size)


class MemoryTensor(NamedTuple):
    """A tensor that lies in no file."""

    dtype: str  # Paddle's name
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
        UserError: when the file is truncated or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path}: {size} bytes, not a whole safetensors file (header of {length} bytes announced)")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(f"{path}: its header is not JSON ({error}); not a safetensors file") from error
    tensors, metadata = {}, {}
    try:
        metadata = header.pop("__metadata__", {})
        for name, entry in header.items():
            (start, stop), shape = entry["data_offsets"], tuple(map(int, entry["shape"]))
            dtype = DTYPE_OF_SAFETENSORS.get(entry["dtype"], "")
            if not dtype:
                known = ", ".join(DTYPE_OF_SAFETENSORS)
                raise UserError(f"{path}: {name} has type {entry['dtype']}; expected one of {known}")
            tensors[name] = StoredTensor(path, dtype, shape, 8 + length + start, stop - start)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its header does not describe tensors ({error!r}); no safetensors file") from error
    for name, tensor in tensors.items():
        end = tensor.offset + tensor.num_bytes
        if end > size:
            raise UserError(f"{path}: {size} bytes, but {name} ends at {end}; the file is truncated")
        if tensor.num_bytes != math.prod(tensor.shape) * item_bytes(tensor.dtype):
            raise UserError(
                f"{path}: {name} has {tensor.num_bytes} bytes, which do not fill {list(tensor.shape)} of {tensor.dtype}"
            )
    return tensors, metadata


def safetensors_header(entries: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file begins with: the length of its JSON and the JSON, filled up to a multiple of 8 bytes.

    Args:
        entries: name -> (type, shape), in the order in which the numbers follow.
        metadata: text entries.
    """
    header: dict = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in entries.items():
        end = offset + math.prod(shape) * item_bytes(dtype)
        header[name] = {"dtype": safetensors_name(dtype), "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file.

    Args:
        path: file to write.
        tensors: values; bfloat16 as bits in uint16.
        dtypes: of each tensor.
        metadata: text entries of the header.
    """
    entries = {name: (dtypes[name], array.shape) for name, array in tensors.items()}
    header = safetensors_header(entries, metadata or {"format": "pt"})
    with path.open("wb") as file:
        file.write(header)
        for array in tensors.values():
            # A transposed view would write its base's bytes in the wrong order.
            file.write(np.ascontiguousarray(array).tobytes())


def cast(bits: np.ndarray, dtype: str, target: str) -> np.ndarray:
    """Values of one type rounded to another (to the nearest, ties to even), as bits."""
    if dtype == target:
        return bits
    if target == "float16":  # not by Paddle, whose float16 of 1e-24 is 4e-5 on CPU
        with np.errstate(over="ignore"):
            return cast(bits, dtype, "float32").astype(np.float16)
    return paddle.to_tensor(bits, place=paddle.CPUPlace()).astype(target).numpy()
