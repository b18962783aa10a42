"""The cases of the official code's numbers, as they are read in the tests of the model."""

import json

import numpy as np

from tests.places import GOLDENS


def golden(family: str, case: str) -> dict:
    """Numbers of one case, e.g. golden("nano_tiny", "crop2x1"): arrays and scalars by name."""
    found = json.loads((GOLDENS / family / "golden.json").read_text())["cases"][case]
    for path in (GOLDENS / family / f"{case}.npz", GOLDENS / family / f"{case}_aux.npz"):
        if path.exists():
            with np.load(path) as arrays:
                found |= {name: arrays[name] for name in arrays.files}
    return found


def batch_of(case: str, expected: dict, ids: str = "input_ids") -> dict:
    """The case as our model takes it: one sequence, its labels shifted by one."""
    tokens = expected[ids]
    batch = {"input_ids": tokens, "position_ids": np.arange(len(tokens)), "seq_lens": np.array([len(tokens)])}
    if case != "text":
        batch["tiles"] = np.load(GOLDENS / "images" / f"{case}.npz")["images_u8"]
        batch["grids"] = expected["images_spatial_crop"]
    if ids == "input_ids":
        batch["labels"] = np.append(expected["labels"][1:], -100)
    return batch
