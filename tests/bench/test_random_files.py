"""Names, shapes, sizes and files of the published checkpoints, and shards filled at random."""

import hashlib
import os

import numpy as np
import pytest

from tests.bench.random_files import draw, plan_shards, tensor_bytes, tensor_shapes, write_shard
from tests.places import GOLDENS
from vl2.checkpoint.published import PUBLISHED, SHARD_BYTES, published
from vl2.checkpoint.tensor_files import read_header
from vl2.config import VL2Config

# Of the published checkpoints: tensors, bytes in bfloat16, and the sha256 of the sorted lines "name BF16 [shape]".
CONTENTS = {
    "deepseek-vl2-tiny": (
        2582,
        6_741_002_880,
        "3bad471e802dcdf76fbe1140e20ba3d202a4307cc5d04495bd51d04a8c8a2300",
    ),
    "deepseek-vl2-small": (
        5639,
        32_296_699_008,
        "a04f77f105427efe3150d269ae2235ac28c8f432da5fe200e19c63737d26bc3d",
    ),
    "deepseek-vl2": (
        6973,
        54_960_268_496,
        "92b2e4db1fc778b65851d0dafec39bc8ddb7d9fa21951ad21a20621a5f4fb800",
    ),
}
# GB of each file, as the hub lists them.
FILES = {
    "deepseek-vl2-tiny": [6.74],
    "deepseek-vl2-small": [8.59, 8.59, 8.59, 6.52],
    "deepseek-vl2": [8.59, 8.59, 8.59, 1.37, 8.60, 8.59, 8.59, 2.03],
}


def blueprint(name):
    entry = PUBLISHED[name]
    shapes = tensor_shapes(VL2Config.from_folder(entry.config.parent))
    return shapes, plan_shards(shapes, shard_bytes=SHARD_BYTES, second_stage=entry.second_stage)


@pytest.mark.parametrize("name", CONTENTS)
def test_names_and_shapes_are_those_of_the_published_checkpoint(name):
    shapes, shards = blueprint(name)
    lines = "".join(sorted(f"{tensor} BF16 {list(shape)}\n" for tensor, shape in shapes.items()))
    num_bytes = sum(map(tensor_bytes, shapes.values()))
    assert (len(shapes), num_bytes, hashlib.sha256(lines.encode()).hexdigest()) == CONTENTS[name]
    assert [tensor for shard in shards for tensor in shard.shapes] == list(shapes)


@pytest.mark.parametrize("name", FILES)
def test_files_are_those_of_the_published_checkpoint(name):
    """To 0.01 GB: in which order a file holds the tensors of its layers is not known."""
    _, shards = blueprint(name)
    sizes = [(shard.num_bytes + len(shard.header())) / 1e9 for shard in shards]
    assert sizes == pytest.approx(FILES[name], abs=0.0101)
    count = len(FILES[name])
    assert [shard.file for shard in shards] == [
        f"model-{i:05d}-of-{count:06d}.safetensors" for i in range(1, count + 1)
    ]


def test_a_name_on_the_hub():
    assert published("deepseek-ai/deepseek-vl2-small") is PUBLISHED["deepseek-vl2-small"]
    assert published("somebody/deepseek-vl2-small") is None
    assert published(GOLDENS / "nano_tiny") is None


def test_experts_come_one_by_one_before_their_router():
    names = list(tensor_shapes(VL2Config.from_folder(GOLDENS / "nano_base")))
    prefix = "language.model.layers.1.mlp."
    of_layer = [name.removeprefix(prefix).removesuffix(".weight") for name in names if name.startswith(prefix)]
    experts = [f"experts.{e}.{projection}_proj" for e in range(8) for projection in ("gate", "up", "down")]
    assert of_layer[: len(experts)] == experts
    assert of_layer[len(experts) :][:3] == ["gate", "gate.e_score_correction_bias", "shared_experts.gate_proj"]


def test_a_shard_ends_with_the_tensor_that_fills_it():
    """The docstring's example, in numbers of two bytes."""
    sizes = dict(zip("abcde", [2, 3, 1, 5, 1]))
    shards = plan_shards({name: (n,) for name, n in sizes.items()}, shard_bytes=10)
    assert [list(shard.shapes) for shard in shards] == [["a", "b"], ["c", "d"], ["e"]]


def test_second_stage_begins_a_file():
    names = [f"language.model.layers.{layer}.{part}" for layer in (1, 2, 12) for part in "ab"]
    shards = plan_shards(dict.fromkeys(names, (1,)), shard_bytes=100, second_stage=2)
    assert [len(shard.shapes) for shard in shards] == [2, 4]


def values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_drawn_numbers():
    shape = (1500, 1001)  # more than a block, and no multiple of four
    bits = np.concatenate(list(draw("language.lm_head.weight", shape, 3)))
    x = values(bits)
    assert x.size == 1500 * 1001
    assert np.abs(x).min() >= 2**-7 and np.abs(x).max() < 2**-5
    assert x.std() == pytest.approx(0.0189, rel=1e-2)
    assert abs(x.mean()) < 1e-4
    assert len(np.unique(bits)) == 512  # sign, one bit of the exponent, seven of the mantissa
    same, other_seed, other_name = (
        np.concatenate(list(draw(name, shape, seed)))
        for name, seed in (("language.lm_head.weight", 3), ("language.lm_head.weight", 4), ("x.weight", 3))
    )
    assert np.array_equal(bits, same)
    assert (bits == other_seed).mean() < 0.01 and (bits == other_name).mean() < 0.01


def test_norms_are_ones_and_biases_zeros():
    assert values(next(draw("vision.norm.weight", (5,), 0))).tolist() == [1] * 5
    assert values(next(draw("vision.norm.bias", (5,), 0))).tolist() == [0] * 5
    assert values(next(draw("image_newline", (5,), 0))).all()


def test_a_shard_reads_back(tmp_path):
    config = VL2Config.from_folder(GOLDENS / "nano_base")
    (shard,) = plan_shards(tensor_shapes(config), shard_bytes=SHARD_BYTES)
    write_shard(tmp_path / "whole", shard, seed=5)
    write_shard(tmp_path / "holes", shard, seed=5, holes=True)
    whole, metadata, _ = read_header(tmp_path / "whole")
    holes = read_header(tmp_path / "holes").tensors
    assert metadata == {"format": "pt"}
    assert {name: tensor.shape for name, tensor in whole.items()} == shard.shapes
    assert {tensor.dtype for tensor in whole.values()} == {"bfloat16"}
    assert [tensor[1:] for tensor in whole.values()] == [tensor[1:] for tensor in holes.values()]
    for name, tensor in whole.items():
        assert np.array_equal(tensor.read().ravel(), np.concatenate(list(draw(name, tensor.shape, 5)))), name
    assert os.path.getsize(tmp_path / "whole") == os.path.getsize(tmp_path / "holes")
    assert os.stat(tmp_path / "holes").st_blocks * 512 < os.path.getsize(tmp_path / "holes") / 2
    assert not any(tensor.read().any() for tensor in holes.values())
