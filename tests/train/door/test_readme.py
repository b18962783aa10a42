"""Every command of the README is run as it stands there; long ones are shortened by overrides, which win."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.places import ROOT

pytestmark = pytest.mark.slow

# `bash launch.sh test` runs this very test; CI calls it.
NOT_HERE = ("bash launch.sh test",)
SHORT_RUN = (
    "max_steps=2",
    "packs_per_step=1",
    "data.max_tokens=2048",
    "data.workers=0",
    "data.shapes.train=8",
    "data.shapes.test=3",
    "eval.questions=2",
    "eval.max_new_tokens=8",
    "nproc=1",
)


def commands() -> list[str]:
    """`bash launch.sh ...` of the code blocks and tables, in order, each once."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    in_blocks = [line for block in blocks for line in block.splitlines() if line.strip()]
    in_tables = re.findall(r"^\| `(bash launch\.sh[^`]*)`", text, re.MULTILINE)
    return list(dict.fromkeys([*in_blocks, *in_tables]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the reader stands: a few pictures, a data file and a conversation."""
    folder = tmp_path_factory.mktemp("reader")
    picture = Image.new("RGB", (384, 384), "white")
    ImageDraw.Draw(picture).ellipse((80, 80, 300, 300), fill="red")
    picture.save(folder / "cat.jpg")
    turns = [{"role": "user", "content": "<image>\nWhat is this?"}, {"role": "assistant", "content": "A cat."}]
    row = json.dumps({"messages": turns, "images": ["cat.jpg"]})
    (folder / "my.jsonl").write_text(f"{row}\n{row}\n")
    (folder / "qa.csv").write_text("question,answer,picture\nWhat is this?,A cat.,cat.jpg\nHow many?,1,cat.jpg\n")
    told = [{"instruction": f"Say {word}.", "output": word} for word in ("one", "two", "three", "four", "five") * 8]
    (folder / "talks.json").write_text(json.dumps([{**row, "input": str(i)} for i, row in enumerate(told)]))
    (mixture,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (folder / "mix.yaml").write_text(mixture)
    (folder / "talk.json").write_text(json.dumps([*turns, {"role": "user", "content": "Are you sure?"}]))
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    words = shlex.split(command)
    assert words[:2] == ["bash", "launch.sh"], command
    if words[2:3] and words[2].startswith("conf="):
        words += SHORT_RUN
    if words[2:3] == ["infer"]:
        words.append("max_new_tokens=8")
    return subprocess.run(
        ["bash", str(ROOT / "launch.sh"), *words[2:]],
        cwd=folder,
        env={**os.environ, "VENV": "none", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_every_command_of_the_readme_runs(folder):
    found, said = commands(), {}
    assert len(found) >= 12
    for command in found:
        if command in NOT_HERE:
            continue
        ended = run(command, folder)
        assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}"
        said[command] = ended.stdout
        if "json=true" in command or command.startswith("bash launch.sh eval"):
            assert isinstance(json.loads(ended.stdout), dict), command
    # The third command failed: there was no shape.png. It is what the first one says, with the export's folder.
    rehearsed = [command for command in found if "outputs/rehearsal/sft_tiny" in command]
    pasted = [line for line in said["bash launch.sh conf=sft_tiny"].splitlines() if line.startswith("  bash launch.sh")]
    assert [shlex.split(line) for line in pasted] == [
        shlex.split(command.replace("sft_tiny/export ", "sft_tiny ")) for command in rehearsed
    ]
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith('launch.sh" test')
    run_dir = folder / "outputs" / "rehearsal" / "sft_tiny"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["rehearsal"] is True and summary["accuracy_after"] is not None
    assert json.loads((run_dir / "export" / "export.json").read_text())["rehearsal"] is True
    predictions = (folder / "outputs" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["expected"] for line in predictions] == ["A cat.", "A cat."]
