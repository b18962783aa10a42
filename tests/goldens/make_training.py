"""Makes training/<family> again: ten LoRA steps of the official code with PEFT and torch's AdamW.

    pip install peft==0.10.0    # beside what make_goldens.py needs
    python tests/goldens/make_training.py DeepSeek-VL2            # compares with what lies here
    python tests/goldens/make_training.py DeepSeek-VL2 --write    # and replaces it

It starts from adapter_start, which stays, and trains what its configuration targets.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from make_goldens import HERE, inputs_of, off, official_model, stored
from peft import PeftModel
from safetensors.torch import load_file

STEPS = 10
KEYS = ("loss", "grad_norm")


def step_loss(model: Any, cases: list[str]) -> tuple[torch.Tensor, list[int]]:
    """Mean over the supervised tokens of all cases, and their numbers; shifted labels, so BOS is no target."""
    total, counts = torch.zeros(()), []
    for case in cases:
        kept = stored("nano_tiny", case)  # ids and labels are those of every family
        logits = model(**inputs_of(case, kept), use_cache=False, return_dict=True).logits[0, :-1]
        labels = torch.from_numpy(kept["labels"])[1:]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        counts.append(int((labels != -100).sum()))
    return total / sum(counts), counts


def train(checkout: Path, folder: Path, settings: dict[str, Any]) -> tuple[Any, list[dict[str, float]], list[int]]:
    """The trained PEFT model, what each step measured, and the supervised tokens of each case."""
    base = official_model(checkout, folder.name)
    model = PeftModel.from_pretrained(base, str(folder / "adapter_start"), is_trainable=True)
    # In training mode the official experts let gradients through; nothing else differs, there is no dropout.
    model.train()
    for module in base.modules():
        if type(module).__name__ == "MoEGate":
            module.alpha = 0.0
    factors = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in factors) == settings["trainable"]
    optimizer = torch.optim.AdamW(
        factors, lr=settings["lr"], betas=settings["betas"], eps=settings["eps"], weight_decay=0.0
    )
    steps, counts = [], []
    for number in range(1, STEPS + 1):
        loss, counts = step_loss(model, settings["cases"])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(factors, settings["clip"])
        optimizer.step()
        steps.append({"step": number, "loss": loss.item(), "grad_norm": norm.item()})
    return model, steps, counts


def main() -> int:
    """Train both families; compare with what lies here, and with --write replace it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of the official repository")
    parser.add_argument("--write", action="store_true", help="replace the files here")
    options = parser.parse_args()
    good = True
    for folder in sorted((HERE / "training").iterdir()):
        settings = json.loads((folder / "training.json").read_text())
        model, steps, counts = train(options.checkout, folder, settings)
        assert counts == settings["supervised"]
        end = folder.parent / f"{folder.name}.new"
        model.save_pretrained(str(end))
        ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (end, folder / "adapter_end"))
        start = load_file(folder / "adapter_start" / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys() == start.keys()
        missed = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs) ** 0.5
        moved = sum(float((theirs[name] - start[name]).square().sum()) for name in theirs) ** 0.5
        losses, norms = ([[step[key] for step in found] for found in (steps, settings["steps"])] for key in KEYS)
        print(
            f"{folder.name}: loss off by {off(*losses):.1e}, gradient norm by {off(*norms):.1e}, "
            f"adapter by {missed / moved:.1e} of its movement"
        )
        good &= off(*losses) < 1e-5 and off(*norms) < 1e-5 and missed < 1e-4 * moved
        if options.write:
            shutil.copy(end / "adapter_model.safetensors", folder / "adapter_end")
            (folder / "training.json").write_text(json.dumps({**settings, "steps": steps}, indent=1))
        shutil.rmtree(end)
    return 0 if good or options.write else 1


if __name__ == "__main__":
    sys.exit(main())
