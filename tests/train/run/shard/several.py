"""Run by each process of a launcher: several trainings one after the other, so that Paddle is imported once.

python -m train.door.cli tests.train.run.shard.several FILE; FILE holds a JSON list of argument lists. Each process
writes the bytes of the moments it kept in each run to RUN_DIR.rank-N.json.
"""

import json
import sys
from pathlib import Path

import paddle.distributed as dist

from train.config.load import load_config
from train.run.optim import STATE_NAMES
from train.run.saving import Saver
from train.run.training import train


def main(arguments: list[str]) -> int:
    """Entry script: the first exit code that is not 0."""
    kept = {}
    save = Saver.__call__

    def count_and_save(self, trainer):
        moments = trainer.optimizer._accumulators
        kept.clear()
        for kind in STATE_NAMES:
            kept.update({f"{kind}:{name}": int(t.size) * 4 for name, t in moments[kind].items()})
        save(self, trainer)

    Saver.__call__ = count_and_save
    for values in json.loads(Path(arguments[0]).read_text()):
        config = load_config(values)
        if code := train(config):
            return code
        Path(f"{config.run_dir}.rank-{dist.get_rank()}.json").write_text(json.dumps(kept))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
