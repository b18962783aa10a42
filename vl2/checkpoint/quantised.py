"""Reads the weights of a checkpoint into few bits, matrix by matrix, so that they are never all in memory in 16 bits.

On wish what comes of it is kept in files, which a later start reads in place of the checkpoint's:

    FOLDER/nf4-3f61c09ab2d4e817/language.model.layers.1.mlp.experts.gate_up.safetensors

The folder's name says the kind and of which model; each file has the checksum of its numbers. A damaged file is one
that is not there. Files are written whole or not at all, so processes may share a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vl2.checkpoint.fingerprint import stored_fingerprint
from vl2.checkpoint.stored_model import StoredModel
from vl2.checkpoint.tensor_files import read_header, write_safetensors
from vl2.errors import UserError
from vl2.quantised import Quantised, kept_in, quantise, quantised_of

logger = logging.getLogger(__name__)

_FORMAT = "2"  # of the files, and of how numbers are rounded
_MOST_THREADS = 8
_ABANDONED = 3600  # seconds after which a half-written file has no writer any more
_ABOUT, _CHECKSUM = "vl2", "checksum"  # entries of a file's metadata


class QuantisedReader:
    """The weights of one checkpoint in few bits.

    Args:
        weights: the checkpoint.
        frozen: "nf4" or "int8", see `vl2.quantised.kept_in`.
        dtype: type that the weights are rounded to before.
        cache: folder for what comes of it; None: it is not kept.
    """

    def __init__(self, weights: StoredModel, frozen: str, dtype: str, cache: Path | None = None):
        self._weights, self._frozen, self._dtype = weights, frozen, dtype
        self._about = ""
        self._place: Path | None = None
        if cache is not None:
            self._about = json.dumps([_FORMAT, frozen, stored_fingerprint(weights, dtype)])
            self._place = cache / f"{frozen}-{hashlib.sha256(self._about.encode()).hexdigest()[:16]}"
            _sweep(self._place)
        self._writable = True
        # The same ones for all weights: glibc gives each new thread a heap of its own, and keeps what it frees there.
        self._threads = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))

    def close(self) -> None:
        """End the threads; a process that forks later has none of them then."""
        self._threads.shutdown()

    def read(self, path: str) -> Quantised:
        """One parameter.

        Raises:
            UserError: a weight that is not finite.
        """
        shape = self._weights.shapes[path]
        arrays = self._kept(path)
        if arrays is None:
            arrays = self._made(path, shape)
            self._keep(path, arrays)
        return quantised_of(kept_in(path, self._frozen), shape, arrays)

    def _made(self, path: str, shape: list[int]) -> dict[str, np.ndarray]:
        number, kind = math.prod(shape[:-2]), kept_in(path, self._frozen)

        def one(index: int) -> dict[str, np.ndarray]:
            matrix = self._weights.matrix(path, index, self._dtype)
            try:
                return quantise(kind, matrix)
            except ValueError as problem:
                which = f"matrix {index} of " if number > 1 else ""
                raise UserError(f"{self._weights.folder}: {which}{path} cannot be quantised: {problem}") from problem

        first = one(0)
        if number == 1:
            return {name: array[None] for name, array in first.items()}
        stacked = {name: np.empty((number, *array.shape), array.dtype) for name, array in first.items()}

        def place(index: int) -> None:
            for name, array in (one(index) if index else first).items():
                stacked[name][index] = array

        for _ in self._threads.map(place, range(number)):  # kernels and files let go of Python's lock
            pass
        return stacked

    def _kept(self, path: str) -> dict[str, np.ndarray] | None:
        """What a file holds of a parameter; None where there is none that is as it was written."""
        if self._place is None or not (file := self._file(self._place, path)).is_file():
            return None
        with contextlib.suppress(UserError, OSError):
            header = read_header(file)
            arrays = {name: tensor.read() for name, tensor in header.tensors.items()}
            if header.metadata.get(_ABOUT) == self._about and header.metadata.get(_CHECKSUM) == _checksum(arrays):
                return arrays
        logger.warning("%s is damaged; it is made again from the model", file)
        return None

    def _keep(self, path: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a parameter's file, as long as that goes well; the run needs none of it."""
        if self._place is None or not self._writable:
            return
        file = self._file(self._place, path)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        metadata = {"format": "pt", _ABOUT: self._about, _CHECKSUM: _checksum(arrays)}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_safetensors(temporary, arrays, {name: str(array.dtype) for name, array in arrays.items()}, metadata)
            os.replace(temporary, file)
        except OSError as problem:
            self._writable = False
            with contextlib.suppress(OSError):
                temporary.unlink()
            logger.warning(
                "%s: %s; the run goes on, and the next one quantises the model again", self._place, problem.strerror
            )

    @staticmethod
    def _file(place: Path, path: str) -> Path:
        return place / f"{path}.safetensors"


def _sweep(place: Path) -> None:
    """Remove what processes that were killed had half written; others may be writing now."""
    for path in place.glob(".*") if place.is_dir() else ():
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
