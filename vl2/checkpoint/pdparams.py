"""Foreign `.pdparams` (what `paddle.save` writes): which arrays lie where in the file, found without unpickling it.

A .pdparams is a pickle, and a pickle is a program. This reads the few instructions that describe a dictionary of names
and arrays, and refuses every other one: nothing is imported, called or built, and no array is read before it is wanted.

A restricted `pickle.Unpickler` would be shorter, but holds every array in memory at once, beside the model that they
go into: of a file of 1.07 GB it takes 1.07 GB, this none.
"""

from __future__ import annotations

import math
import reprlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vl2.checkpoint.tensor_files import MAX_DIMS, StoredTensor, are_counts, shown
from vl2.dtypes import DTYPE_OF_NUMPY, item_bytes
from vl2.errors import UserError

# Written beside the arrays by paddle.save: structured name -> Paddle's automatic name.
_NAME_TABLE = "StructuredToParameterName@@"
_RECONSTRUCT = (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"))
_NDARRAY, _DTYPE, _TUPLE = ("numpy", "ndarray"), ("numpy", "dtype"), ("builtins", "tuple")
_ADMITTED = (*_RECONSTRUCT, _NDARRAY, _DTYPE, _TUPLE)
# Ten times what the largest published model's 5,639 tensors take.
_MAX_STEPS = 2_000_000


class _Name(NamedTuple):
    """What a pickle would import; here only its name."""

    module: str
    name: str


class _Bytes(NamedTuple):
    """Bytes of the file that were passed over."""

    offset: int
    length: int


@dataclass
class _Type:
    code: str


@dataclass
class _Array:
    shape: tuple[int, ...] = ()
    dtype: str = ""
    content: _Bytes | None = None


_MARK = object()  # where a list of operands begins on the stack


def read_pdparams(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of a .pdparams by name; bfloat16 as its bits in uint16.

    Raises:
        UserError: see `locate_arrays`.
    """
    return {name: tensor.read() for name, tensor in locate_arrays(path).items()}


def locate_arrays(path: str | Path) -> dict[str, StoredTensor]:
    """Where each array of a .pdparams lies in the file.

    Raises:
        UserError: the file is truncated, is no pickle of protocol 3 or 4, or holds anything but arrays by name.
    """
    path = Path(path)
    with path.open("rb") as file:
        content = _Reader(path, file).run()
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a dictionary of arrays, found a {type(content).__name__}")
    tensors = {}
    for name, value in content.items():
        if name == _NAME_TABLE:
            continue
        if type(value) is tuple and len(value) == 2:  # a Tensor inside another container: (automatic name, array)
            value = value[1]
        if not isinstance(name, str) or not isinstance(value, _Array) or value.content is None:
            raise UserError(f"{path}: expected arrays by name, found {_in_words(value)} at {reprlib.repr(name)}")
        tensors[name] = _stored(path, name, value, value.content)
    return tensors


def _stored(path: Path, name: str, array: _Array, content: _Bytes) -> StoredTensor:
    where = f"{path}: {shown(name)}"
    if array.dtype not in DTYPE_OF_NUMPY:
        raise UserError(f"{where} has numpy's type {shown(array.dtype)}; expected one of {', '.join(DTYPE_OF_NUMPY)}")
    kind = DTYPE_OF_NUMPY[array.dtype]
    if math.prod(array.shape) * item_bytes(kind) != content.length:
        raise UserError(f"{where} has {content.length} bytes, which do not fill {shown(list(array.shape))} of {kind}")
    return StoredTensor(path, kind, array.shape, content.offset, content.length)


def _in_words(value: Any) -> str:
    return "an array without content" if isinstance(value, _Array) else f"a {type(value).__name__.strip('_')}"


class _Reader:
    """Reads a pickle's instructions; a stack and a memo like pickle's, but every value is inert.

    Source: the opcodes are documented in CPython's Lib/pickletools.py.
    """

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file, self.size = path, file, path.stat().st_size
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.steps: dict[int, Callable[[], Any]] = {
            ord("}"): lambda: self.stack.append({}),
            ord("]"): lambda: self.stack.append([]),
            ord(")"): lambda: self.stack.append(()),
            ord("N"): lambda: self.stack.append(None),
            0x88: lambda: self.stack.append(True),
            0x89: lambda: self.stack.append(False),
            ord("("): lambda: self.stack.append(_MARK),
            ord("K"): lambda: self.stack.append(self.number("<B")),
            ord("M"): lambda: self.stack.append(self.number("<H")),
            ord("J"): lambda: self.stack.append(self.number("<i")),
            0x8A: lambda: self.stack.append(int.from_bytes(self.take(self.number("<B")), "little", signed=True)),
            0x8C: lambda: self.text("<B"),
            ord("X"): lambda: self.text("<I"),
            ord("C"): lambda: self.content("<B"),
            ord("B"): lambda: self.content("<I"),
            0x8E: lambda: self.content("<Q"),
            0x94: lambda: self.memo.__setitem__(len(self.memo), self.stack[-1]),
            ord("q"): lambda: self.memo.__setitem__(self.number("<B"), self.stack[-1]),
            ord("r"): lambda: self.memo.__setitem__(self.number("<I"), self.stack[-1]),
            ord("h"): lambda: self.stack.append(self.memo[self.number("<B")]),
            ord("j"): lambda: self.stack.append(self.memo[self.number("<I")]),
            0x85: lambda: self.tuple_of(1),
            0x86: lambda: self.tuple_of(2),
            0x87: lambda: self.tuple_of(3),
            ord("t"): lambda: self.stack.append(tuple(self.since_mark())),
            ord("s"): lambda: self.set_items([self.stack.pop(-2), self.stack.pop()]),
            ord("u"): lambda: self.set_items(self.since_mark()),
            ord("a"): lambda: self.extend([self.stack.pop()]),
            ord("e"): lambda: self.extend(self.since_mark()),
            0x93: lambda: self.name(self.stack.pop(-2), self.stack.pop()),
            ord("c"): lambda: self.name(self.line(), self.line()),
            ord("R"): self.reduce,
            ord("b"): self.build,
            0x95: lambda: self.file.seek(8, 1),  # how many bytes to fetch at once
        }

    def run(self) -> Any:
        """The described value."""
        if self.take(2) not in (b"\x80\x03", b"\x80\x04"):
            raise UserError(
                f"{self.path}: expected a pickle of protocol 3 or 4, as paddle.save writes; where you trust the file, "
                "paddle.save(paddle.load(FILE), NEW, protocol=4) brings it into that form"
            )
        count = 0
        while (code := self.take(1)[0]) != ord("."):
            step, count = self.steps.get(code), count + 1
            if count > _MAX_STEPS:
                raise UserError(f"{self.path}: over {_MAX_STEPS} instructions, more than any model's weights take")
            if step is None:
                raise self.refusal(f"instruction {bytes([code])!r}")
            try:
                step()
            except UserError:
                raise
            except (IndexError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{self.path}: damaged at byte {self.file.tell()} ({shown(str(error))})") from error
        return self.stack[-1] if self.stack else None

    def refusal(self, what: str) -> UserError:
        return UserError(
            f"{self.path}: {what} at byte {self.file.tell()} is no part of a dictionary of arrays. A .pdparams can run "
            "any code when it is unpickled; this one was not, and nothing of it was run"
        )

    # ---- operands

    def take(self, count: int) -> bytes:
        found = self.file.read(count) if count <= self.size else b""
        if len(found) != count:
            raise UserError(f"{self.path}: {self.size} bytes, the file is truncated or no pickle")
        return found

    def number(self, layout: str) -> int:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        return self.file.readline(256).decode().rstrip("\n")

    def text(self, layout: str) -> None:
        self.stack.append(self.take(self.number(layout)).decode())

    def content(self, layout: str) -> None:
        length = self.number(layout)
        found = _Bytes(self.file.tell(), length)
        if found.offset + length > self.size:
            raise UserError(f"{self.path}: {self.size} bytes, but an array ends at {found.offset + length}; truncated")
        self.file.seek(length, 1)
        self.stack.append(found)

    # ---- containers

    def since_mark(self) -> list[Any]:
        operands: list[Any] = []
        while (operand := self.stack.pop()) is not _MARK:
            operands.append(operand)
        return operands[::-1]

    def tuple_of(self, count: int) -> None:
        operands = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(operands)

    def set_items(self, operands: list[Any]) -> None:
        if type(self.stack[-1]) is not dict:
            raise TypeError("entries of something that is no dictionary")
        if not all(isinstance(name, str) for name in operands[::2]):  # to hash a deep tuple would end the process
            raise TypeError("a name that is no text")
        self.stack[-1].update(zip(operands[::2], operands[1::2], strict=True))

    def extend(self, operands: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise TypeError("entries of something that is no list")
        self.stack[-1].extend(operands)

    # ---- what would be imported, called and filled

    def name(self, module: Any, name: Any) -> None:
        if (module, name) not in _ADMITTED:
            raise self.refusal(f"{shown(module)}.{shown(name)}")
        self.stack.append(_Name(module, name))

    def reduce(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if called in _RECONSTRUCT and arguments[:1] == (_NDARRAY,):
            self.stack.append(_Array())
        elif called == _DTYPE and isinstance(arguments[0], str):
            self.stack.append(_Type(arguments[0]))
        elif called == _TUPLE and len(arguments) == 1 and isinstance(arguments[0], tuple):
            self.stack.append(arguments[0])
        else:
            raise self.refusal(f"a call of {shown(called)}")

    def build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, _Array):
            _, shape, dtype, by_columns, content = state
            if not isinstance(dtype, _Type) or not isinstance(content, _Bytes):
                raise self.refusal("an array of objects")
            if not isinstance(shape, tuple) or len(shape) > MAX_DIMS or not are_counts(list(shape)):
                raise TypeError(f"a shape of {shown(shape)}")
            if by_columns and len(shape) > 1:
                raise UserError(
                    f"{self.path}: the array of {list(shape)} that ends at byte {self.file.tell()} lies column by "
                    "column (it was transposed); save it again after numpy.ascontiguousarray"
                )
            built.shape, built.dtype, built.content = shape, dtype.code, content
        elif isinstance(built, _Type):
            if state[1] not in ("<", "|"):
                raise UserError(f"{self.path}: numbers in the byte order {reprlib.repr(state[1])}; expected '<'")
        else:
            raise self.refusal("a state")
