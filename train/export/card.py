"""README.md of an export, a model card: what it was made of, how it was trained, what was verified, how it is loaded.

Everything in it stands in a file: of the export, of its base, or of the run. What no file says is left out. No path of
the machine goes into it: folders are called by their last name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import from_json

from train.ask.note import note
from train.ask.source import Source
from train.export.loading import how_to_load
from train.store.checkpoints import is_checkpoint
from train.store.names import CONFIG_FILE, MARKER, METRICS, REPORT, STATE_FILE, SUMMARY
from train.store.provenance import ExportReport

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Of the base's own card: what holds for what was made of it.
_INHERITED = ("license", "license_name", "license_link", "language")
CARD = "README.md"
# The last line of a card, by which one that somebody edited is known.
_SEAL = re.compile(r"\n<!-- as export wrote it: ([0-9a-f]{16}) -->\n\Z")
_TURNED = "turn them as their EXIF orientation says before they are shown, as in training"


def card(report: ExportReport, source: Source, advice: str = "") -> str:
    """The model card of an export.

    Args:
        report: of the export.
        source: of what was exported.
        advice: what a user of an adapter must call before anything else; empty: nothing.
    """
    run = _run_facts(source.trained) if source.trained else {}
    name = _base_name(source)
    title = "An adapter of DeepSeek-VL2" if report.adapter else "A fine-tuned DeepSeek-VL2"
    about = {
        "base model": name,
        "recipe": Path(report.recipe).name,
        "weights": f"{report.dtype}, {_layout(report)}; the licence is the base model's",
        "images": _TURNED if report.exif == "rotate" else "",
        "made with": ", ".join(f"{package} {version}" for package, version in report.versions.items()),
    }
    verified = {key: value for key, value in report.verified.items() if key != "kv_b_proj_modules"}  # see advice
    parts = [
        _header(report, source, name),
        f"# {title}",
        "**From a rehearsal on nano: not for use.**" if report.rehearsal else "",
        f"**Before anything else, {advice}.**" if advice else "",
        _table(("", ""), about.items()),
        _section("Training", _table(("", ""), _training(run).items())),
        _section("Results", _results(run)),
        _section("Verified when it was written", _table(("", ""), verified.items())),
        "## How to load it",
        how_to_load(report),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def write_card(folder: Path, out: Path, text: str) -> None:
    """Write a card, unless the export that is replaced has one that somebody wrote: that one is kept.

    Args:
        folder: being filled.
        out: its name later, where an earlier export may lie.
        text: from `card`.
    """
    old = out / CARD
    if old.is_file() and not _is_ours(old):
        note(f"{old} is not as an export wrote it, so it is kept as it is; remove it to have a new one")
        (folder / CARD).write_bytes(old.read_bytes())
        return
    (folder / CARD).write_text(f"{text}\n<!-- as export wrote it: {_digest(text)} -->\n", encoding="utf-8")


def _is_ours(path: Path) -> bool:
    text = path.read_bytes().decode("utf-8", errors="replace")
    seal = _SEAL.search(text)
    return seal is not None and seal.group(1) == _digest(text[: seal.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _run_facts(trained: Path) -> dict[str, Mapping[str, Any]]:
    """What the files of a run say, by the file's name; of a checkpoint what is its own, and the run's start report.

    Args:
        trained: folder of the adapter or the weights, in a run, in a checkpoint, or elsewhere.
    """
    folder = trained if is_checkpoint(trained) or (trained / MARKER).is_file() else trained.parent
    if is_checkpoint(folder):
        places = {STATE_FILE: folder, CONFIG_FILE: folder, REPORT: folder.parent.parent}
    elif (folder / MARKER).is_file():
        places = {SUMMARY: folder, CONFIG_FILE: folder, REPORT: folder}
    else:
        places = {}
    facts = {name: found for name, place in places.items() if (found := _document(place / name))}
    if step := facts.get(STATE_FILE, {}).get("step"):
        facts[METRICS] = _validations(folder.parent.parent / METRICS, step)
    return facts


def _validations(path: Path, step: int) -> dict[str, Mapping[str, Any]]:
    """What metrics.jsonl says of the held-out rows before the first step, and at a checkpoint's: its `eval_` values."""
    found: dict[str, Mapping[str, Any]] = {}
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = from_json(line)
        except ValueError:
            continue  # cut off, or being written
        if not isinstance(row, Mapping):
            continue
        values = {key.removeprefix("eval_"): row[key] for key in row if key.startswith("eval_")}
        when = "before" if row.get("step") == 0 else "after" if row.get("step") == step else ""
        if values and when:
            found[when] = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    return found


def _document(path: Path) -> Mapping[str, Any]:
    """A file's document; empty where there is none that can be read: the card does without it."""
    try:
        data = path.read_bytes()
        found = yaml.safe_load(data) if path.suffix == ".yaml" else from_json(data)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _base_name(source: Source) -> str:
    """The base as the hub calls it where it was named so, else its folder's last name."""
    typed = source.base_name
    if _HUB_NAME.fullmatch(typed) and not (source.provenance and source.provenance.base_path):
        return typed
    return source.base.resolve().name


def _layout(report: ExportReport) -> str:
    if report.adapter:
        return f"in the files of {'PEFT' if report.adapter == 'peft' else 'PaddleNLP'}"
    return "in PaddleMIX's layout" if report.layout == "paddle" else "in the official layout"


def _header(report: ExportReport, source: Source, name: str) -> str:
    library = {"peft": "peft", "paddle": "paddlenlp", None: "transformers" if report.layout == "hf" else "paddlenlp"}
    values: dict[str, Any] = {
        "base_model": name,
        "base_model_relation": "adapter" if report.adapter else "finetune",
        "library_name": library[report.adapter],
        **_licence(source.base),
    }
    values["pipeline_tag"] = "image-text-to-text"
    values["tags"] = ["deepseek_vl_v2", "lora" if report.kind == "adapter" else "full-fine-tune"]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip()}\n---"


def _licence(base: Path) -> dict[str, Any]:
    """Licence and languages as the base's own card has them; without one, the licence's file that goes along."""
    try:
        text = (base / "README.md").read_text(encoding="utf-8")
        found = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else {}
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        found = {}
    if isinstance(found, Mapping) and "license" in found:
        return {key: found[key] for key in _INHERITED if key in found}
    files = sorted(path.name for path in base.glob("LICEN[CS]E*") if path.is_file())
    return {"license": "other", "license_link": files[0]} if files else {}


def _training(run: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Settings and data of the run, in words."""
    report, config = run.get(REPORT, {}), run.get(CONFIG_FILE, {})
    plan, optim = _object(report, "plan"), _object(config, "optim")
    tuned = _rows(report, "lora")
    groups = [_sentence("{group} (rank {rank}, {parameters:,} numbers)", row) for row in tuned if row.get("rank")]
    whole = [_sentence("{group} ({parameters:,} numbers)", row) for row in tuned if not row.get("rank")]
    kinds = [name for name, key in (("PiSSA", "pissa"), ("rsLoRA", "rslora")) if _object(config, "lora").get(key)]
    parts = [_sentence("{part} ({trainable:,} numbers)", row) for row in _rows(report, "parts") if row.get("trainable")]
    steps = _steps(run)
    words = {
        "trained": f"{' and '.join(kinds) or 'LoRA'} on {', '.join(groups)}" if groups else ", ".join(parts),
        "trained beside it": ", ".join(whole),
        "data": _sentence("{samples:,} conversations; in all {tokens:,} tokens, {supervised:,} of them learned", plan),
        "plan": _sentence("{packs:,} packs, {steps:,} steps of {packs_per_step} packs, {epochs} epoch(s)", plan),
        "fingerprint of data and plan": plan.get("fingerprint"),
        "steps made": f"{steps:,}" if steps else "",
        "learning rate": _sentence("{lr}, {schedule}, warm-up {warmup_ratio}", optim),
        "precision": config.get("precision"),
        "frozen matrices of the base": "" if (kept := _object(config, "model").get("frozen")) == "none" else kept,
        "seed": config.get("seed"),
    }
    return {name: value for name, value in words.items() if value not in (None, "")}


def _steps(run: Mapping[str, Mapping[str, Any]]) -> int | None:
    return run.get(SUMMARY, {}).get("steps") or run.get(STATE_FILE, {}).get("step")


def _results(run: Mapping[str, Mapping[str, Any]]) -> str:
    """Losses of the first and the last step, and every number of the held-out rows before and after."""
    summary = run.get(SUMMARY, {})
    losses = summary.get("losses") or _object(run.get(STATE_FILE, {}), "history").get("losses") or []
    losses = [loss for loss in losses if loss is not None]  # steps that were left out
    rows = [("training loss (first and last step)", losses[0], losses[-1])] if losses else []
    held_out = _object(summary, "evaluation") or run.get(METRICS, {})
    before, after = (_object(held_out, when) for when in ("before", "after"))
    for key in dict.fromkeys([*before, *after]):
        rows.append((f"held-out {key}", before.get(key), after.get(key)))
    return _table(("", "before", "after"), rows) if rows else ""


def _object(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = document.get(key)
    return found if isinstance(found, Mapping) else {}


def _rows(document: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    return [row for row in document.get(key) or [] if isinstance(row, Mapping)]


def _sentence(form: str, values: Mapping[str, Any]) -> str:
    """A text with values in it; empty where one of them is missing."""
    try:
        return form.format_map(values)
    except (KeyError, ValueError, TypeError):
        return ""


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """A table of the rows that have a value; empty where none has."""
    told = [[_cell(value) for value in row] for row in rows if any(value not in (None, "") for value in row[1:])]
    lines = [head, ["---"] * len(head), *told]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if told else ""


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
