"""Run by each process of a launcher: several trainings one after the other, so that Paddle is imported once.

python -m train.door.cli tests.train.run.shard.several FILE; FILE holds a JSON list of argument lists. Each process
writes the bytes that it held in each run, between two steps, to RUN_DIR.rank-N.json.
"""

import json
import sys
from pathlib import Path

import paddle.distributed as dist

from train.config.load import load_config
from train.run.optim import STATE_NAMES
from train.run.saving import Saver
from train.run.shard.layers import SharedLayers
from train.run.training import train


def main(arguments: list[str]) -> int:
    """Entry script: the first exit code that is not 0."""
    kept = {}
    save, end_step = Saver.__call__, SharedLayers.end_step

    def count_and_save(self, trainer):
        moments = trainer.optimizer._accumulators
        kept["moments"] = {
            f"{kind}:{name}": int(t.size) * 4 for kind in STATE_NAMES for name, t in moments[kind].items()
        }
        if trainer.shared is not None:
            layers = {name: trainer.parameters[name] for name in trainer.shared.names}
            own = {name for name in layers if trainer.shared.owner[name] == dist.get_rank()}
            kept["layers"] = sum(int(p.size) for p in layers.values())
            kept["own_layers"] = sum(int(layers[name].size) for name in own)
            kept["weights"] = sum(int(p.size) for p in layers.values() if p._is_initialized())
        save(self, trainer)

    def count_and_end(self):
        reached = end_step(self)
        every = [p for layer in self._layers.values() for p in layer.values()]
        kept["gradients"] = sum(int(p.size) for p in every if p.grad is not None and p.grad._is_initialized())
        return reached

    Saver.__call__, SharedLayers.end_step = count_and_save, count_and_end
    for values in json.loads(Path(arguments[0]).read_text()):
        kept.clear()
        config = load_config(values)
        if code := train(config):
            return code
        Path(f"{config.run_dir}.rank-{dist.get_rank()}.json").write_text(json.dumps(kept))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
