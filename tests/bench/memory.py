"""Memory of training, computed and measured, by hand: `bash launch.sh bench memory [nano|mid] [--ranks 1 2 4]`.

Trains two steps on full packs in so many processes on the CPU, full fine-tuning and LoRA, with a checkpoint on the
way, and compares the most that a process held (its resident set) with what train.run.memory says of it before. mid is
the model of `bench step`, with random weights. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from PIL import Image

from tests.bench.step import model_config
from train.config.conf_files import ROOT
from train.config.load import load_config
from train.config.schema import NANO
from train.machine.memory import gigabytes
from train.run.memory import training_memory
from vl2.config import VL2Config

WAYS = {
    "lora": ("lora.groups=[attention,experts,shared_experts]",),
    "full": ("lora.rank=0", "trainable=[projector,language]"),
}
TOKENS, STEPS = 1024, 2


def main(arguments: list[str]) -> None:
    """Entry script, and that of the processes it starts."""
    if arguments[:1] == ["process"]:
        train_and_tell(Path(arguments[1]), arguments[2:])
        return
    parser = argparse.ArgumentParser(prog="bash launch.sh bench memory", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="nano", choices=("nano", "mid"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="processes (default 1 2)")
    parser.add_argument("--way", nargs="+", default=list(WAYS), choices=WAYS, help="what trains (default both)")
    parser.add_argument("--stage", type=int, default=1, choices=(0, 1), help="of sharding, where there are several")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="of training, more")
    asked = parser.parse_args(arguments)
    found = []
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as name:
        folder = Path(name)
        model, data = write_model(folder, asked.model), write_data(folder)
        for way in asked.way:
            for ranks in asked.ranks:
                shared = (f"sharding.stage={asked.stage}",) if ranks > 1 else ()
                keys = (*WAYS[way], *shared, *asked.keys, f"nproc={ranks}", f"packs_per_step={ranks}")
                run = folder / f"{way}-{ranks}"
                command = arguments_of(model, data, run, keys)
                need = training_memory(VL2Config.from_folder(model), load_config(command))
                measured = measure(folder, ranks, command)
                shutil.rmtree(run)
                # The first process has the copy of a checkpoint too, and it is the largest.
                computed, most = need.process_bytes(first=True), max(measured)
                found.append({"way": way, "ranks": ranks, "computed": computed, "measured": most})
                print(
                    f"{asked.model} {way:5} {ranks} process(es)  computed {gigabytes(computed):>9}  "
                    f"measured {gigabytes(most):>9}  {computed / most:.2f}",
                    flush=True,
                )
                print("   ", need, flush=True)
    print(json.dumps({"model": asked.model, "runs": found}))


def write_model(folder: Path, kind: str) -> Path:
    """A folder of the model: nano as it is, or a config of mid with nano's tokenizer."""
    if kind == "nano":
        return NANO
    model = folder / "mid"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, model)
    (model / "config.json").write_text(json.dumps(model_config("mha", "mid")))
    return model


def write_data(folder: Path) -> Path:
    """Conversations that fill a pack each: a picture of three tiles, and text up to the last tokens."""
    draw = random.Random(0)
    Image.new("RGB", (768, 384), (200, 30, 60)).save(folder / "wide.png")
    words = ("red", "blue", "circle", "square", "two", "three", "left", "right")
    rows = []
    for _ in range(64):
        answer = " ".join(draw.choice(words) for _ in range(380))
        messages = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": messages, "images": ["wide.png"]}))
    path = folder / "data.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def arguments_of(model: Path, data: Path, run: Path, keys: tuple[str, ...]) -> list[str]:
    """The `key=value` arguments of a training."""
    fixed = {
        "conf": "sft_tiny",
        "model.path": model,
        "model.init": "random",
        "data.path": data,
        "data.max_tokens": TOKENS,
        "data.max_tiles_per_pack": 3,
        "data.workers": 0,
        "run_dir": run,
        "rehearse": "false",
        "device": "cpu",
        "precision": "fp32",
        "max_steps": STEPS,
        "save_steps": 1,
        "optim.lr": 1e-5,
        "log": "[]",
    }
    fixed.update(key.split("=", 1) for key in keys)
    return [f"{key}={value}" for key, value in fixed.items()]


def measure(folder: Path, ranks: int, command: list[str]) -> list[int]:
    """Bytes that each process of a training held at most."""
    work = ["-u", "-m", "train.door.cli", "tests.bench.memory", "process", str(folder), *command]
    if ranks > 1:
        launcher = ["-m", "train.door.ranks", "cpu", "--nproc_per_node", str(ranks), "--log_dir", str(folder / "log")]
        work = [*launcher, sys.executable, *work]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    environ["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([sys.executable, *work], cwd=ROOT, env=environ, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    return [int((folder / f"peak-{rank}").read_text()) for rank in range(ranks)]


def train_and_tell(folder: Path, command: list[str]) -> None:
    """Train in this process, and write down the most it held.

    The first checkpoint is written when the next step has its gradients: the computed memory is that of a slow disk.
    """
    import paddle.distributed as dist
    from paddlenlp.trainer import TrainerCallback

    import train.run.saving as saving
    from train.run.training import train

    has_gradients, write = threading.Event(), saving.write_folder

    class Later(TrainerCallback):
        def on_optimizer_begin(self, args, state, control, **details):
            if state.global_step == 1:
                has_gradients.set()

    def wait_and_write(*arguments, **options):
        has_gradients.wait()
        write(*arguments, **options)

    saving.write_folder = wait_and_write
    if code := train(load_config(command), callbacks=[Later()]):
        sys.exit(code)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / f"peak-{dist.get_rank()}").write_text(str(peak))
