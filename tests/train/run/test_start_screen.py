"""What a run says at its start fits a screen, and says what matters."""

import pytest

from train.config.load import load_config
from train.machine.devices import Machine
from train.page.sources import SourceFacts
from train.run.build import PartCount
from train.run.build_data import HeldOutFacts
from train.run.report import MemoryFacts, PlanFacts, RunFacts, StartReport
from train.run.start_screen import MOST_LINES, WIDTH, start_screen
from vl2.lora import GroupReport

SOURCE = {"form": "messages", "held_out": 9, "skipped": 0, "supervised": 5, "images": 1, "tiles": 2, "unknown": {}}
GPU = Machine(gpus=1, driver="CUDA Version: 12.6", gpu_paddle=True)


def report(*, sources: int, held_out: bool, groups: int) -> StartReport:
    names = ("attention", "experts", "shared_experts", "dense_mlp", "vision", "projector")
    return StartReport(
        run=RunFacts(recipe="sft_tiny", rehearsal=False, model="deepseek-vl2-tiny", processes=8, precision="bf16"),
        parts=tuple(
            PartCount(part=part, trainable=10**8, frozen=3 * 10**9, stored_bytes=10**9)
            for part in ("vision", "projector", "language")
        ),
        lora=tuple(GroupReport(group=name, rank=64, modules=12, parameters=10**7) for name in names[:groups]),
        plan=PlanFacts(
            samples=123_456,
            skipped=7,
            packs=1000,
            packs_per_step=8,
            steps=125,
            epochs=3,
            tokens=10**7,
            supervised=10**6,
            tiles=10**5,
            fill=0.987,
            fingerprint="0" * 64,
            held_out=HeldOutFacts(rows=6000, asked=200, same_conversations=0, same_pictures=0) if held_out else None,
        ),
        memory=MemoryFacts(
            computed_gb=61.25,
            parts_gb={
                "frozen weights": 0.03,
                "trained weights": 13.42,
                "gradients": 13.42,
                "Adam's moments": 26.84,
                "gradients on their way": 0.99,
                "a step on a full pack": 4.62,
            },
            checkpoint_gb=40.26,
            resident_gb=7.9,
            machine_gb=128.0,
        ),
        sources=tuple(
            SourceFacts(name=f"/data/{'very/' * 30}{i}.jsonl", kept=10, tokens=100 + i, repeat=2.5, **SOURCE)
            for i in range(sources)
        ),
    )


@pytest.mark.parametrize(("sources", "held_out", "groups"), [(1, False, 0), (2, True, 4), (90, True, 6)])
def test_the_start_fits_a_screen(sources, held_out, groups):
    """It was 65 lines of YAML and five tables."""
    more = ("log=[wandb,visualdl]", "eval.every=0.25", "eval.patience=3", "data.eval_path=x.jsonl")
    config = load_config(["conf=sft_tiny", "run_dir=outputs/mine", *(more if held_out else ())], GPU)
    said = start_screen(config, report(sources=sources, held_out=held_out, groups=groups), first_step=25)
    lines = said.splitlines()
    assert len(lines) <= MOST_LINES and max(map(len, lines)) <= WIDTH
    for word in ("sft_tiny", "outputs/mine", "deepseek-vl2-tiny", "123,456", "125, 25 of them made", "61.25 GB"):
        assert word in said
    for word in ("metrics.jsonl", "config.yaml", "report.html", "resume=auto", "every 200 steps"):
        assert word in said
    assert ("attention 10.00 M (rank 64)" in said) == (groups > 0)
    assert ("every 0.25 epochs: loss of 6,000 rows, 200 questions" in " ".join(said.split())) == held_out
    assert ("data.eval_fraction=0.05" in said) == (not held_out)
    assert ("and 86 more" in said) == (sources == 90)
