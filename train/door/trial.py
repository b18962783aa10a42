"""Trains and answers on nano for `doctor`: once on the device that runs take, once in float32 on the CPU; and compares.

Each is a process of its own: `python -m train.door.cli train.door.trial FOLDER DEVICE PRECISION`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from train.config.load import load_config
from train.config.schema import InferConfig
from train.machine.health import COMPUTING, Finding
from train.machine.memory import peak_memory_gb

RESULT = "trial.json"
# Three steps on pictures with LoRA in every default group, recomputation included.
_RUN = (
    "conf=sft_tiny",
    "rehearse=true",
    "data.shapes.train=24",
    "data.shapes.test=6",
    "data.max_tokens=1536",
    "data.workers=0",
    "packs_per_step=1",
    "max_steps=3",
    "optim.lr=1e-3",
    "recompute=1",
    "save_steps=0",
    "eval.questions=0",
    "log=[]",
)
_PICTURES, _QUESTION, _ANSWER_TOKENS = 4, "What is this?", 8
# In emulation bfloat16 moves the losses of these steps by as much and the gradient norms by as much, and float16 by
# less; a card sums in another order, so a few times that is no fault yet.
EMULATED_LOSS, EMULATED_NORM = 0.9e-3, 8e-3
LOSS_TOLERANCE, NORM_TOLERANCE = 5e-3, 5e-2


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What came out of it."""

    losses: list[float]  # of each step
    grad_norms: list[float | None]  # None in a step that overflowed in fp16
    answers: list[str]
    seconds: float
    peak_gb: float


def main(arguments: list[str]) -> int:
    """Entry script of one trial."""
    folder, device, precision = arguments
    (Path(folder) / RESULT).write_text(json.dumps(asdict(run_trial(Path(folder), device, precision))), "utf-8")
    return 0


def run_trial(folder: Path, device: str, precision: str) -> Trial:
    """Train nano for a few steps and ask what came of it about pictures.

    Args:
        folder: to write into.
        device: cpu or gpu.
        precision: of the run.
    """
    # Here: PaddleNLP takes seconds to import, and `compare` needs none of it.
    from train.ask.infer import infer
    from train.ask.load import load
    from train.run.training import train

    started, run_dir = time.perf_counter(), folder / "run"
    config = load_config([*_RUN, f"run_dir={run_dir}", f"device={device}", f"precision={precision}", "nproc=1"])
    if code := train(config, validate=False):
        raise RuntimeError(f"the run ended with exit code {code}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    loaded, answers = load(run_dir, precision), []
    for number in range(_PICTURES):
        picture = run_dir / "data" / "test" / "images" / f"{number:06d}-1.png"
        asked = InferConfig(
            model=str(run_dir), image=[str(picture)], prompt=_QUESTION, max_new_tokens=_ANSWER_TOKENS, device=device
        )
        answers.append(infer(loaded, asked)["text"])
    return Trial(
        losses=[line["loss"] for line in lines],
        grad_norms=[line["grad_norm"] for line in lines],
        answers=answers,
        seconds=time.perf_counter() - started,
        peak_gb=peak_memory_gb(),
    )


def read_trial(folder: Path) -> Trial:
    """What `main` wrote."""
    return Trial(**json.loads((folder / RESULT).read_text("utf-8")))


def compare(found: Trial, expected: Trial, what: str) -> list[Finding]:
    """What of a trial differs from the one in float32 on the CPU by more than the emulation did.

    Args:
        found: on the device, in its precision.
        expected: in float32 on the CPU.
        what: device and precision in words.
    """
    loss = _farthest(found.losses, expected.losses)
    norm = _farthest(found.grad_norms, expected.grad_norms)
    same = sum(a == b for a, b in zip(found.answers, expected.answers, strict=True))
    asked = len(expected.answers)
    words = [
        (f"losses of {len(expected.losses)} steps", loss, EMULATED_LOSS, LOSS_TOLERANCE),
        ("gradient norms", norm, EMULATED_NORM, NORM_TOLERANCE),
    ]
    findings = [
        Finding(
            part="training",
            words=f"{what}: {name} {error:.2%} off the CPU's float32 (emulated {emulated:.2%}, limit {limit:.1%})",
            code=0 if error <= limit else COMPUTING,
        )
        for name, error, emulated, limit in words
    ]
    told = f"{what}: {same} of {asked} answers as in float32 on the CPU"
    if same < asked:
        other = next((a, b) for a, b in zip(found.answers, expected.answers, strict=True) if a != b)
        told += f"; {other[0]!r} instead of {other[1]!r}"
    findings.append(Finding(part="answering", words=told, code=0 if same == asked else COMPUTING))
    findings.append(
        Finding(part="cost", words=f"{what}: {found.seconds:.0f} s, at most {found.peak_gb:.2f} GB", note=True)
    )
    return findings


def _farthest(found: Sequence[float | None], expected: Sequence[float | None]) -> float:
    """Largest relative difference; steps that overflowed in fp16 have no norm to compare."""
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    errors = [abs(a - b) / abs(b) for a, b in pairs]
    return max((error if error == error else float("inf") for error in errors), default=float("inf"))
