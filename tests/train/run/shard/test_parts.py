"""Which process keeps what, and the optimizer's state in files of several processes."""

import threading
from types import SimpleNamespace

import numpy as np
import paddle
import pytest

from train.run.optim import build_optimizer, optimizer_state
from train.run.shard.group import ShardGroup
from train.run.shard.optimizer import ShardedOptimizer
from train.run.shard.parts import leave_part, part_name, parts_folder, stored_state, sweep_parts, take_parts, write_part
from train.run.stop import PeerLost, check_peers, peer_lost

SHAPES = {"table": [60, 2], "wide": [10, 5], "narrow": [10, 4], "bias": [10]}


def process(index: int, degree: int):
    """Parameters, and the optimizer of one of several processes."""
    parameters = {f"vision.{name}": paddle.create_parameter(shape, "float32") for name, shape in SHAPES.items()}
    group = ShardGroup(degree=degree, index=index, group=SimpleNamespace(ranks=list(range(degree))))
    return parameters, build_optimizer(parameters, 0.1, share=lambda optimizer: ShardedOptimizer(optimizer, group))


@pytest.mark.parametrize(
    ("degree", "expected"), [(2, ["table", "wide narrow bias"]), (4, ["table", "wide", "narrow", "bias"])]
)
def test_whole_parameters_are_given_out_by_size(degree, expected):
    """120 | 50 + 40 + 10 numbers; and nobody has moments of another one's."""
    for index in range(degree):
        parameters, optimizer = process(index, degree)
        state = optimizer_state(optimizer, parameters)
        assert {name.partition(":")[0].removeprefix("vision.") for name in state} == set(expected[index].split())
        own = {parameters[f"vision.{name}"].name for name in expected[index].split()}
        assert set(optimizer._accumulators["moment1"]) == own


def test_more_processes_than_parameters():
    parameters, optimizer = process(4, 5)
    assert optimizer_state(optimizer, parameters) == {}


def test_a_part_that_will_not_come_is_not_waited_for(tmp_path):
    """Another process could not write its part: the first one hung until it was killed."""
    peer_lost.set()
    try:
        with pytest.raises(PeerLost):
            take_parts(parts_folder(tmp_path, 20), tmp_path, 2, check_peers)
    finally:
        peer_lost.clear()


def test_parts_come_together(tmp_path):
    """The first waits for the others, whose files appear whole."""
    state = {name: np.full(3, i, "float32") for i, name in enumerate("abcd")}
    waiting, folder = parts_folder(tmp_path, 20), tmp_path / "step"
    folder.mkdir()
    write_part(folder / part_name(0, 3), {"a": state["a"]})
    taking = threading.Thread(target=take_parts, args=(waiting, folder, 3, check_peers))
    taking.start()
    leave_part(waiting, {"b": state["b"], "d": state["d"]}, 2, 3)
    leave_part(waiting, {"c": state["c"]}, 1, 3)
    taking.join()
    assert {name: tensor.read().tolist() for name, tensor in stored_state(folder).items()} == {
        name: array.tolist() for name, array in state.items()
    }
    assert not waiting.exists()

    (folder / part_name(1, 3)).unlink()
    with pytest.raises(ValueError, match=r"optimizer-00001-of-00003\.safetensors: no such file; .* of 3 processes$"):
        stored_state(folder)
    write_part(folder / part_name(1, 3), {"d": state["d"]})
    with pytest.raises(ValueError, match=r"00002-of-00003\.safetensors: d is in another part too$"):
        stored_state(folder)
    write_part(folder / part_name(0, 2), {})
    with pytest.raises(ValueError, match=r"00000-of-00002\.safetensors: beside the optimizer's state of 3 processes"):
        stored_state(folder)


def test_what_a_killed_attempt_left_is_swept(tmp_path):
    leave_part(parts_folder(tmp_path, 20), {"a": np.zeros(3, "float32")}, 1, 2)
    sweep_parts(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(path, *rest):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.run.shard.parts.write_safetensors", full)
    with pytest.raises(ValueError, match=r"optimizer-00001-of-00002\.safetensors: the disk is full"):
        leave_part(tmp_path, {}, 1, 2)
    assert list(tmp_path.iterdir()) == []
