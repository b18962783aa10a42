"""Prints how long photographs take to be measured by their headers, beside decoding them: the sizes of a data set.

By hand: `bash launch.sh bench images`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data.images.reader import ImageReader
from data.images.ref import ImageRef

_DISTINCT = 16  # photographs that are drawn; the others are further names of them


def main(arguments: list[str]) -> None:
    """Entry script."""
    parser = argparse.ArgumentParser(prog="bash launch.sh bench images", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000, help="how many photographs")
    parser.add_argument("--decoded", type=int, default=200, help="how many of them are decoded, for the comparison")
    parser.add_argument("--size", type=int, nargs=2, default=[2048, 1536], help="width and height, pixels")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        refs = [ImageRef(kind="file", name=str(path)) for path in _photographs(Path(folder), asked.count, asked.size)]
        num_bytes = sum(os.path.getsize(ref.name) for ref in refs)
        print(
            f"{len(refs)} JPEGs of {asked.size[0]} x {asked.size[1]} pixels, {num_bytes / len(refs) / 1e3:.0f} kB each"
        )
        for ref in refs[:_DISTINCT]:
            ImageReader().decode(ref)  # what is read once lies in memory for both ways
        decode = _milliseconds(ImageReader().decode, refs[: asked.decoded])
        found = {"count": len(refs), "decode_ms": decode}
        for name, reader in (("header", ImageReader()), ("header_rotate", ImageReader(exif="rotate"))):
            found[f"{name}_ms"] = _milliseconds(reader.size, refs)
            found[f"{name}_part"] = round(found[f"{name}_ms"] / decode, 4)
            print(f"{name}: {found[f'{name}_ms']:.3f} ms, {found[f'{name}_part']:.2%} of {decode:.2f} ms to decode it")
    print(json.dumps(found))


def _photographs(folder: Path, count: int, size: list[int]) -> list[Path]:
    """Draw smooth noise, which compresses like a photograph, with the EXIF block of a camera."""
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        if number < _DISTINCT:
            coarse = np.random.default_rng(number).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
            grain = Image.effect_noise((size[0], size[1]), 20).convert("RGB")
            smooth = Image.fromarray(coarse).resize((size[0], size[1]), Image.Resampling.BICUBIC)
            Image.blend(smooth, grain, 0.3).save(path, quality=90, exif=exif)
        else:
            os.link(paths[number % _DISTINCT], path)
        paths.append(path)
    return paths


def _milliseconds(use: Callable[[ImageRef], object], refs: list[ImageRef]) -> float:
    started = time.perf_counter()
    for ref in refs:
        use(ref)
    return round((time.perf_counter() - started) / len(refs) * 1e3, 4)
