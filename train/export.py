"""`bash launch.sh export run=FOLDER`: merge in float32, write a checkpoint in the official layout, verify, name it.

The folder gets its name only after (a) every tensor read back equals round(base + delta) bit for bit, untouched ones
the base's; (b) the unrounded merge gives the adapter model's logits; (c) what rounding costs was measured.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from tqdm import tqdm

from train.checkpoint import MANIFEST, write_folder
from train.cli import run_cli
from train.config import ExportConfig, load_export_config
from train.devices import use_device
from train.files import EXPORT_REPORT
from train.inference import DTYPES, Loaded, Source, find_source, load, stored_dtype
from train.state import versions
from vl2.lora import MergedTensor, VL2LoRAModel, merge_in_place, merged_tensors
from vl2.model import DeepseekVL2
from vl2.prompt import Message, render
from vl2.tiles import TILE_SIZE
from vl2.weights import (
    build_model,
    checkpoint_tensors,
    load_model,
    official_parts,
    official_tensors,
    save_tensors,
)

# (b): float32 sums in another order; measured on nano below 1e-5.
MERGE_TOLERANCE = 1e-4
# (c): mean KL of next-token distributions, in nats, that rounding to the stored type may cost.
MAX_KL = 0.02
# Written anew, because they hold the resolutions in force, or made from other files.
_OWN_FILES = ("config.json", "processor_config.json", "README.md", EXPORT_REPORT, MANIFEST)


def main(arguments: list[str]) -> int:
    """Entry script."""
    config = load_export_config(arguments)
    use_device(config.device)
    report = export(config)
    print(f"exported to {config.out}")
    for key, value in report["verified"].items():
        print(f"  {key:32} {value:.3g}" if isinstance(value, float) else f"  {key:32} {value}")
    if report["rehearsal"]:
        print("note: this export comes from a rehearsal on nano")
    return 0


def export(config: ExportConfig) -> dict[str, Any]:
    """Write and verify one export.

    Returns:
        What export.json holds: where it comes from, and what was verified.

    Raises:
        ValueError: `out` holds something, `run` holds nothing trained, or the export is not what it should be (then
            nothing stands under its name).
    """
    if config.adapter:
        from train.export_adapter import export_adapter  # here: it needs check_out of this file

        return export_adapter(config)
    if config.layout != "hf":
        raise ValueError(f"layout={config.layout}: only layout=hf is there so far")
    source, out = find_source(config.run, config.base), Path(config.out)
    if source.trained is None:
        raise ValueError(f"run={config.run}: nothing was trained there; it is a base model or an export already")
    check_out(out, overwrite=config.overwrite)
    base_dtype = stored_dtype(source.base)
    dtype = base_dtype if config.dtype == "base" else DTYPES[config.dtype]
    # Full fine-tunes are held in float32, as they were trained; under an adapter the base's bits must stay.
    precision = {v: k for k, v in DTYPES.items()}[base_dtype if source.kind == "adapter" else "float32"]
    loaded = load(config.run, precision, base=config.base)
    probe = make_probe(loaded)
    report: dict[str, Any] = {
        "run": str(config.run),
        "base": str(source.base),
        "kind": source.kind,
        "dtype": dtype,
        "layout": config.layout,
        "rehearsal": source.rehearsal,
        "recipe": source.about.get("recipe", ""),
        "versions": versions(),
    }

    def write(folder: Path) -> None:
        trained_logits = logits_of(loaded.model, probe)
        merged = merged_tensors(loaded.lora) if isinstance(loaded.lora, VL2LoRAModel) else {}
        save_tensors(_merged_official(loaded.model, merged, dtype), folder)
        write_companions(folder, loaded, dtype)
        verified: dict[str, Any] = {"tensors": verify_tensors(folder, loaded, source, merged, dtype)}
        if isinstance(loaded.lora, VL2LoRAModel):
            verified["adapter_factors_used"] = verify_factors_used(loaded.lora, merged)
            merge_in_place(loaded.lora)
            verified["merge_error"] = verify_merge(trained_logits, logits_of(loaded.model, probe))
        verified.update(verify_rounding(trained_logits, logits_of(load_model(folder, dtype=dtype), probe)))
        report["verified"] = verified
        (folder / EXPORT_REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(report), encoding="utf-8")

    write_folder(out, write)
    return report


def check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is an earlier export and may be replaced.

    Raises:
        ValueError: saying what to do.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / EXPORT_REPORT).is_file():
        raise ValueError(f"out={out}: there are files that no export wrote; give another folder")
    if not overwrite:
        raise ValueError(f"out={out}: there is an export already; give overwrite=true to replace it, or another out=")


def _merged_official(
    model: DeepseekVL2, merged: Mapping[str, MergedTensor], dtype: str
) -> Iterator[tuple[str, np.ndarray, str]]:
    """Official tensors of the merged model, one parameter in memory at a time."""
    parameters = dict(model.named_parameters())
    skeleton = build_model(model.config, model.image_token_id)
    for path, parts in _progress(list(official_parts(skeleton)), "merge and write"):
        whole = paddle.to_tensor(merged[path]()) if path in merged else parameters[path]
        for name, piece in official_tensors(path, whole.astype(dtype).numpy(), parts):
            yield name, piece, dtype


def verify_tensors(folder: Path, loaded: Loaded, source: Source, merged: Mapping[str, MergedTensor], dtype: str) -> int:
    """(a) Read every tensor back; the base's side comes from the base's files again.

    Returns:
        Number of tensors compared.
    """
    written = checkpoint_tensors(folder)
    parameters = dict(loaded.model.named_parameters())
    has_files = source.about.get("init") != "random"
    base = checkpoint_tensors(source.base) if has_files and source.kind == "adapter" else None
    skeleton = build_model(loaded.model.config, loaded.model.image_token_id)
    wrong, count = [], 0
    for path, parts in _progress(list(official_parts(skeleton)), "verify"):
        if path in merged:
            whole = paddle.to_tensor(merged[path]()).astype(dtype).numpy()
            expected = dict(official_tensors(path, whole, parts))
        elif base is None:
            expected = dict(official_tensors(path, parameters[path].astype(dtype).numpy(), parts))
        else:
            expected = {p.name: paddle.to_tensor(base[p.name].read()).astype(dtype).numpy() for p in parts}
        for name, array in expected.items():
            count += 1
            if name not in written or not np.array_equal(written[name].read(), array):
                wrong.append(name)
    extra = sorted(written.keys() - {p.name for _, parts in official_parts(skeleton) for p in parts})
    if wrong or extra:
        raise ValueError(
            f"the export was refused: {len(wrong)} tensors read back otherwise than written ({'; '.join(wrong[:5])}), "
            f"{len(extra)} do not belong there ({'; '.join(extra[:5])})"
        )
    return count


def verify_factors_used(lora: VL2LoRAModel, merged: Mapping[str, MergedTensor]) -> int:
    """(a) Every A and B of the adapter went into a merged tensor; returns their number."""
    used = {id(factor) for tensor in merged.values() for pair in tensor.factors for factor in pair}
    unused = [name for name, factor in lora.factors().items() if id(factor) not in used]
    if unused:
        raise ValueError(f"the export was refused: adapter weights that no tensor took up: {'; '.join(unused[:5])}")
    return len(used)


def verify_merge(adapter: np.ndarray, merged: np.ndarray) -> float:
    """(b) Largest difference of the logits, relative to the largest logit."""
    error = float(np.abs(adapter - merged).max() / np.abs(adapter).max())
    if not error <= MERGE_TOLERANCE:
        raise ValueError(
            f"the export was refused: the float32 merge changes logits by {error:.2e} of the largest, "
            f"more than {MERGE_TOLERANCE:.0e}"
        )
    return error


def verify_rounding(trained: np.ndarray, exported: np.ndarray) -> dict[str, float]:
    """(c) What rounding costs on the probe: mean |Δlogit|, mean KL in nats, and how often the next token agrees."""
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (trained, exported))
    kl = float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())
    if not kl <= MAX_KL:
        raise ValueError(
            f"the export was refused: rounding costs a KL of {kl:.3f} nats, more than {MAX_KL}; try dtype=fp32"
        )
    return {
        "rounding_mean_logit_change": float(np.abs(trained - exported).mean()),
        "rounding_kl": kl,
        "rounding_next_token_agreement": float((trained.argmax(-1) == exported.argmax(-1)).mean()),
    }


def make_probe(loaded: Loaded) -> dict[str, np.ndarray]:
    """A conversation with one drawn picture of two tiles and its global view, for comparing logits."""
    messages = [
        Message(role="user", content="<image>\nWhat is in this picture?"),
        Message(role="assistant", content="A red circle on the left and stripes on the right."),
        Message(role="user", content="这是什么？"),
        Message(role="assistant", content="红色圆形"),
    ]
    grid = (2, 1) if (2 * TILE_SIZE, TILE_SIZE) in loaded.candidates else (1, 1)
    rows, columns = np.mgrid[0:TILE_SIZE, 0:TILE_SIZE]
    circle = np.full([3, TILE_SIZE, TILE_SIZE], 230, np.uint8)
    circle[:, (rows - 190) ** 2 + (columns - 190) ** 2 < 110**2] = np.array([[210], [40], [40]], np.uint8)
    stripes = np.where((columns // 32) % 2, 40, 220).astype(np.uint8)[None].repeat(3, axis=0)
    tiles = np.stack([circle, circle, stripes][: 1 + grid[0] * grid[1]])
    rendered = render(messages, [grid], loaded.tokenizer)
    tokens = len(rendered.input_ids)
    return {
        "input_ids": rendered.input_ids,
        "position_ids": np.arange(tokens),
        "seq_lens": np.array([tokens]),
        "tiles": tiles,
        "grids": np.array([grid]),
    }


def logits_of(model: DeepseekVL2, probe: Mapping[str, np.ndarray]) -> np.ndarray:
    """float64 logits [N, V] at the N text positions of the probe; next to an image's own rows nothing is predicted."""
    with paddle.no_grad():
        hidden = model(probe)
        text = np.flatnonzero(probe["input_ids"] != model.image_token_id)
        return model.language.logits(paddle.gather(hidden, paddle.to_tensor(text))).numpy().astype(np.float64)


def write_companions(folder: Path, loaded: Loaded, dtype: str) -> None:
    """Everything beside the weights: config and processor with the resolutions in force, tokenizer, licence, ..."""
    base = loaded.source.base
    for file in sorted(base.iterdir()):
        is_weights = file.name.endswith((".safetensors", ".safetensors.index.json"))
        if file.is_file() and not is_weights and file.name not in _OWN_FILES:
            shutil.copyfile(file, folder / file.name)
    loaded.tokenizer.save(folder)
    config = loaded.model.config.to_dict()
    if config.get("torch_dtype") and dtype != stored_dtype(base):
        config["torch_dtype"] = dtype
    _write_json(folder / "config.json", config, base / "config.json")
    processor = base / "processor_config.json"
    if processor.is_file():
        document = json.loads(processor.read_text(encoding="utf-8"))
        document["candidate_resolutions"] = [list(c) for c in loaded.candidates]
        _write_json(folder / "processor_config.json", document, processor)


def _write_json(target: Path, document: Mapping[str, Any], original: Path) -> None:
    """Write JSON; where it says what the original says, the original's bytes."""
    if original.is_file() and json.loads(original.read_text(encoding="utf-8")) == document:
        shutil.copyfile(original, target)
    else:
        target.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_card(report: Mapping[str, Any]) -> str:
    """README.md of an export: what it is and what was verified."""
    lines = [
        "# A fine-tuned DeepSeek-VL2",
        "",
        "**From a rehearsal on nano: not for use.**\n" if report["rehearsal"] else "",
        f"- recipe: {report['recipe']}",
        f"- base model: {report['base']}",
        f"- weights: {report['dtype']}, official layout; the licence is the base model's",
        "",
        "Verified when it was written:",
        *(
            f"- {key}: {value:.3g}" if isinstance(value, float) else f"- {key}: {value}"
            for key, value in report["verified"].items()
        ),
        "",
        "    bash launch.sh infer model=FOLDER image=... prompt=...",
    ]
    return "\n".join(lines) + "\n"


def _progress(items: list, title: str):
    return tqdm(items, desc=title, unit="parameter", file=sys.stderr, mininterval=1.0)


if __name__ == "__main__":
    run_cli(main)
