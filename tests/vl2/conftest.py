"""What the tests of LoRA and of adapters compute on."""

import numpy as np
import pytest

from tests.places import GOLDENS
from tests.vl2.random_models import IMAGE_ID
from vl2.config import VL2Config


@pytest.fixture(scope="module")
def config() -> VL2Config:
    return VL2Config.from_folder(GOLDENS / "nano_tiny")


@pytest.fixture(scope="module")
def batch() -> dict:
    """Two conversations in one stream: an image of one tile and the global view, then text only."""
    rng = np.random.default_rng(5)
    image = np.full(421, IMAGE_ID)
    ids = np.concatenate([rng.integers(5, 900, 9), image, rng.integers(5, 900, 20), rng.integers(5, 900, 30)])
    labels = np.where((np.arange(len(ids)) > 435) & (np.arange(len(ids)) % 3 > 0), np.roll(ids, -1), -100)
    labels[-1] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": np.concatenate([np.arange(450), np.arange(30)]),
        "seq_lens": np.array([450, 30]),
        "tiles": rng.integers(0, 255, (2, 3, 384, 384)).astype("uint8"),
        "grids": np.array([[1, 1]]),
    }
