"""The decoder layers that processes share: what each loads and keeps, and what the model calls around them."""

import numpy as np
import paddle
import paddle.distributed as dist
import pytest

from train.config.load import load_config
from train.machine.devices import Machine
from train.run.build import keeps, trained_names
from train.run.shard.layers import SharedLayers
from train.run.shard.partition import LAYERS, layer_of, owners
from train.run.state import trainable_parameters
from vl2.checkpoint.load import load_model
from vl2.parameters import train_parameters
from vl2.shared_weights import computed_with

FULL = ("lora.rank=0", "trainable=[projector,language]", "nproc=2", "sharding.stage=3", "eval.questions=0")


def test_a_process_loads_what_it_keeps(golden_folder, monkeypatch):
    """Together all layers; what lies outside of them in each, and what does not train."""
    folder = golden_folder("nano_base")  # with a correction bias, which does not train
    config = load_config(["conf=sft_tiny", f"model.path={folder}", "device=cpu", *FULL], Machine(gpus=0))
    here = []
    for rank in range(2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        whole = load_model(folder)
        model = load_model(folder, keep=keeps(config, whole.config))
        train_parameters(model, trained_names([name for name, _ in model.named_parameters()], config.trainable))
        trained = trainable_parameters(model)
        shared = SharedLayers(trained, 3, rank=rank, num_ranks=2, meet=lambda: None)
        here.append({name for name, p in model.named_parameters() if p._is_initialized()})
        assert {name for name in shared.names if shared.owner[name] == rank} == here[-1] & shared.names
        assert {name: list(p.shape) for name, p in model.named_parameters()} == {
            name: list(p.shape) for name, p in whole.named_parameters()
        }
    assert here[0] & here[1] == {name for name, _ in model.named_parameters()} - shared.names
    assert here[0] | here[1] > shared.names and any("correction_bias" in name for name in here[0] & here[1])
    assert all(name.startswith(LAYERS) for name in shared.names)


def test_owners():
    """The largest first, each to the one with least."""
    given = owners({"a": 3, "language.model.layers.10.b": 5, "c": 2, "d": 2}, 2)
    assert given == {"language.model.layers.10.b": 0, "a": 1, "c": 1, "d": 0}
    assert layer_of("language.model.layers.10.b") == 10 and layer_of("language.model.norm.weight") is None


class Recorded:
    """Weights of layers that are always here; what is called, in order."""

    def __init__(self):
        self.calls = []

    def fetch(self, index):
        self.calls.append(("fetch", index))

    def release(self, index):
        self.calls.append(("release", index))

    def collect(self, index):
        self.calls.append(("collect", index))


@pytest.mark.parametrize("frozen_input", [True, False])
def test_a_layer_is_computed_twice_with_one_dropout(frozen_input):
    """Gradients are those of the plain layer, whose input may need none (the first layer of a frozen embedding)."""
    layer = paddle.nn.Sequential(paddle.nn.Linear(4, 4), paddle.nn.Dropout(0.5))
    found = []
    for way in ("plain", "shared"):
        weights = Recorded()
        x = paddle.to_tensor(np.arange(12, dtype="float32").reshape(3, 4))
        x.stop_gradient = frozen_input
        paddle.seed(3)
        y = layer(x) if way == "plain" else computed_with(weights, 5, layer, x)
        after = paddle.rand([2]).numpy()  # the stream of random numbers goes on alike
        y.square().sum().backward()
        assert np.array_equal(after, found[0][0]) if found else True
        found.append((after, y.numpy(), layer[0].weight.grad.numpy(), None if frozen_input else x.grad.numpy()))
        layer.clear_gradients()
    for plain, shared in zip(*found, strict=True):
        assert np.array_equal(plain, shared) if plain is not None else shared is None
    forward, backward = [("fetch", 5), ("release", 5)], [("fetch", 5), ("collect", 5), ("release", 5)]
    assert weights.calls == forward + backward
    with paddle.no_grad():
        computed_with(weights, 5, layer, x)
    assert weights.calls == forward + backward + forward
