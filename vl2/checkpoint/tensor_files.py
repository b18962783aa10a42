"""Tensors in files: where each lies in a checkpoint, safetensors read and written, one type rounded to another.

16-bit floats are handled as their bits. Knows nothing of the model.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import paddle

from vl2.dtypes import DTYPE_OF_SAFETENSORS, bits_type, item_bytes, safetensors_name
from vl2.errors import UserError

# The format's own limit, so that a damaged length does not have the whole file read; and numpy's.
_MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 32


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


class Header(NamedTuple):
    """What stands at the beginning of a safetensors file."""

    tensors: dict[str, StoredTensor]  # in the header's order
    metadata: dict[str, str]
    raw: bytes  # the JSON as it stands, with what fills it up


def read_header(path: Path) -> Header:
    """Names and places of the tensors of one safetensors file, and its metadata.

    As strict as the format: 8 bytes with the header's length (at most 100 MB); a JSON object without duplicate keys, of
    entries {dtype, shape, data_offsets} and __metadata__ of texts; the tensors fill the rest without gap or overlap.

    Raises:
        UserError: when the file is not so; names the tensor.
    """
    raw, size = _raw_header(path)
    document = _parsed(path, raw)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise UserError(f"{path}: __metadata__ of its header: expected an object of texts; no safetensors file")
    start = 8 + len(raw)
    tensors = {name: _located(path, name, entry, start) for name, entry in document.items()}
    _check_filled(path, tensors, start, size)
    return Header(tensors, metadata, raw)


def _raw_header(path: Path) -> tuple[bytes, int]:
    """The header's JSON, and the bytes of the whole file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a safetensors file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path}: {size} bytes, not a whole safetensors file (header of {length} bytes announced)")
        if length > _MAX_HEADER_BYTES:
            raise UserError(
                f"{path}: a header of {length} bytes is announced, at most {_MAX_HEADER_BYTES} are allowed; "
                "not a safetensors file"
            )
        return file.read(length), size


def _parsed(path: Path, raw: bytes) -> dict[str, Any]:
    twice: list[str] = []

    def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return found

    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=once_each)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its header is not JSON ({error}); not a safetensors file") from error
    if twice:
        raise UserError(f"{path}: its header has {shown(twice[0])} twice; not a safetensors file")
    if not isinstance(document, dict):
        raise UserError(f"{path}: its header is a JSON {type(document).__name__}, expected an object of tensors")
    return document


def _located(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    """One entry of a header, checked; `start` is where the values begin in the file."""
    where = f"{path}: {shown(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise UserError(f"{where}: expected an object with dtype, shape and data_offsets; no safetensors file")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPE_OF_SAFETENSORS:
        raise UserError(f"{where} has type {shown(kind)}; expected one of {', '.join(DTYPE_OF_SAFETENSORS)}")
    if not are_counts(shape) or len(shape) > MAX_DIMS:
        raise UserError(f"{where} has the shape {shown(shape)}; expected a list of at most {MAX_DIMS} sizes")
    if not are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(f"{where} has data_offsets {shown(offsets)}; expected [first byte, byte after the last]")
    dtype, num_bytes = DTYPE_OF_SAFETENSORS[kind], offsets[1] - offsets[0]
    if num_bytes != math.prod(shape) * item_bytes(dtype):
        raise UserError(f"{where} has {num_bytes} bytes, which do not fill {shown(shape)} of {dtype}")
    return StoredTensor(path, dtype, tuple(shape), start + offsets[0], num_bytes)


def _check_filled(path: Path, tensors: Mapping[str, StoredTensor], start: int, size: int) -> None:
    """Tensors lie one behind the other, from the header to the end of the file: the format allows no gap."""
    end, last = start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if tensor.offset + tensor.num_bytes > size:
            after = tensor.offset + tensor.num_bytes
            raise UserError(f"{path}: {size} bytes, but {shown(name)} ends at {after}; the file is truncated")
        if tensor.offset != end:
            what = "overlaps" if tensor.offset < end else f"begins {tensor.offset - end} bytes behind"
            raise UserError(f"{path}: {shown(name)} {what} {last}; not a safetensors file")
        end, last = tensor.offset + tensor.num_bytes, shown(name)
    if end != size:
        raise UserError(f"{path}: {size - end} bytes follow {last}, which ends the values; not a safetensors file")


def are_counts(value: Any) -> bool:
    """Whether this is a list of whole numbers that numpy can count with; `true` is none."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def shown(value: Any) -> str:
    """A value of a foreign file as a part of an error's one line: short, and nothing that a terminal would obey."""
    if isinstance(value, str) and value.isprintable():
        return value if len(value) <= 200 else f"{value[:200]}..."
    return reprlib.repr(value)


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
            file.write(np.ascontiguousarray(array).data)


def cast(bits: np.ndarray, dtype: str, target: str) -> np.ndarray:
    """Values of one type rounded to another (to the nearest, ties to even), as bits."""
    if dtype == target:
        return bits
    if target == "float16":  # not by Paddle, whose float16 of 1e-24 is 4e-5 on CPU
        with np.errstate(over="ignore"):
            return cast(bits, dtype, "float32").astype(np.float16)
    return paddle.to_tensor(bits, place=paddle.CPUPlace()).astype(target).numpy()
