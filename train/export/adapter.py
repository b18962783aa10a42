"""`bash launch.sh export run=FOLDER adapter=peft|paddle`: the adapter alone, in the files of PEFT or of PaddleNLP.

Needs the base's config.json, not its weights, but for the two rows that PaddleNLP wants, and what lies beside a trained
weight in a module that PEFT saves whole. The folder gets its name only
after it was read back: every tensor bit for bit, and every module's A and scaled B as the run has them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn

from train.ask.note import note
from train.ask.processor import PROCESSOR_CONFIG, exif_in_force, processor_document, resolutions_in_force
from train.ask.source import Source, find_source
from train.config.schema import ExportConfig
from train.export.card import card, write_card
from train.export.folder import check_out
from train.store.facts import to_document, write_fact
from train.store.names import EXPORT_REPORT
from train.store.provenance import ExportReport
from train.store.versions import versions
from train.store.whole_folder import write_folder
from vl2.adapter.folder import open_adapter
from vl2.adapter.foreign import Adapter, Piece, foreign_tensors, untuned_modules
from vl2.adapter.formats import (
    ENTRY,
    PADDLE_CONFIG,
    PADDLE_INDEX,
    PADDLE_SHARD,
    PEFT,
    PEFT_CONFIG,
    PEFT_FILE,
    adapter_format,
    adapter_tensors,
)
from vl2.adapter.paddle_format import PADDLE_NAMES, common_settings, paddle_config, paddle_index
from vl2.adapter.peft_format import PEFT_NAMES, PEFT_PREFIX, peft_config
from vl2.adapter.plain import as_plain
from vl2.adapter.slots import Slot, slots
from vl2.adapter.weights import ROWS, replacing, saved_module, whole_parts, written_weights
from vl2.checkpoint.model_folder import ModelFolder, open_folder
from vl2.checkpoint.tensor_files import write_safetensors
from vl2.config import VL2Config
from vl2.errors import UserError
from vl2.parameters import build_model, init_model

# One float32 rounding of B where it takes in another scaling; none where the scaling stays.
_ROUNDING = 2.0**-23


def export_adapter(config: ExportConfig) -> ExportReport:
    """Write and verify the adapter of a run, or of an adapter's folder of any format.

    Args:
        config: with `adapter` set.

    Returns:
        What export.json says.

    Raises:
        UserError: `run` holds no adapter, keys that do not go together, `out` holds something, or the folder reads
            back otherwise than written (then nothing stands under its name).
    """
    if config.layout != "hf" or config.dtype != "base":
        raise UserError(
            f"adapter={config.adapter} with layout={config.layout} dtype={config.dtype}: these two are for merged "
            "weights, an adapter is written in float32; leave them out"
        )
    source, out = find_source(config.run, config.base, checksums=config.check == "full"), Path(config.out)
    if source.kind != "adapter" or source.trained is None:
        raise UserError(f"run={config.run}: there is no adapter, so adapter={config.adapter} has nothing to write")
    check_out(out, source, overwrite=config.overwrite)
    base = open_folder(source.base)
    skeleton = build_model(base.config, base.tokenizer.image_id)
    found = slots(skeleton)
    adapter = as_plain(open_adapter(source.trained, skeleton), found)
    peft = config.adapter == PEFT
    written = adapter.settings if peft else common_settings(adapter.settings)
    if untuned := untuned_modules(adapter):
        note(f"{untuned}; zeros are written for them")
    tensors = foreign_tensors(adapter, found, PEFT_NAMES if peft else PADDLE_NAMES, written)
    value_of = base_values(source, base)
    weights, parts = replacing(adapter, value_of), whole_parts(skeleton, "hf" if peft else "paddle")
    modules = {saved_module(path) for path in weights}
    if peft:
        if rows := [name for name in ROWS if name in weights]:
            raise UserError(
                f"run={config.run}: it has trained {' and '.join(rows)} too, which PEFT's files cannot hold; export "
                "merged weights (without adapter=), or adapter=paddle"
            )
        saved = [path for path in parts if saved_module(path) in modules]
        tensors.update(written_weights(saved, weights, value_of, PEFT_PREFIX, parts))
    else:
        tensors.update(written_weights({**weights, **dict.fromkeys(ROWS)}, weights, value_of, "", parts))
    report = ExportReport(
        run=config.run,
        base=str(source.base),
        kind="adapter",
        adapter="peft" if peft else "paddle",
        layout=None,
        dtype="float32",
        frozen=source.frozen,  # type: ignore[arg-type]
        rehearsal=source.rehearsal,
        recipe=source.recipe,
        step=source.step,
        versions=versions(),
        verified={},
        cost=None,
        exif=exif_in_force(source),
    )

    def write(folder: Path) -> None:
        nonlocal report
        name = source.base_name or str(source.base)
        about = to_document(source.provenance) if source.provenance else {}
        if peft:
            write_peft(folder, tensors, peft_config(written, name, sorted(modules)), about)
        else:
            own = [path for path in weights if path not in ROWS]
            write_paddle(folder, tensors, paddle_config(written, name, own), about)
        write_processor(folder, source, skeleton.config)
        report = replace(report, verified=verify(folder, skeleton, adapter, weights, tensors))
        write_fact(folder / EXPORT_REPORT, report)
        write_card(folder, out, card(report, source, merge_first(report)))

    write_folder(out, write)
    return report


def base_values(source: Source, base: ModelFolder) -> Callable[[str], paddle.Tensor]:
    """Gives a parameter of the base by its path; no other is read, and none before the first call.

    Raises:
        UserError: the base's weights are not there, when called.
    """

    @cache
    def drawn() -> Mapping[str, paddle.Tensor]:
        assert source.random_seed is not None
        model = init_model(base.config, base.tokenizer.image_id, seed=source.random_seed)
        return dict(model.named_parameters())

    return lambda path: base.weights.parameter(path) if source.random_seed is None else drawn()[path]


def write_processor(folder: Path, source: Source, config: VL2Config) -> None:
    """processor_config.json with the resolutions in force: at others an image becomes other tokens than in training."""
    document = processor_document(source, config)
    document["candidate_resolutions"] = [list(pair) for pair in resolutions_in_force(source, config)]
    (folder / PROCESSOR_CONFIG).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_peft(
    folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """The two files of PEFT; what we know of the run goes into the header of the weights."""
    _write_weights(folder / PEFT_FILE, tensors, {"format": "pt"}, about)
    _write_json(folder / PEFT_CONFIG, config)


def write_paddle(
    folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """One shard, its index and lora_config.json. PaddleNLP takes files of the format "np" only."""
    _write_weights(folder / PADDLE_SHARD, tensors, {"format": "np"}, about)
    _write_json(folder / PADDLE_INDEX, paddle_index(tensors))
    _write_json(folder / PADDLE_CONFIG, config)


def _write_weights(
    path: Path, tensors: Mapping[str, np.ndarray], header: Mapping[str, str], about: Mapping[str, Any]
) -> None:
    entry = {ENTRY: json.dumps(dict(about), sort_keys=True)} if about else {}
    write_safetensors(path, tensors, dict.fromkeys(tensors, "float32"), {**header, **entry})


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def verify(
    folder: Path,
    skeleton: nn.Layer,
    adapter: Adapter,
    weights: Mapping[str, Piece],
    tensors: Mapping[str, np.ndarray],
) -> dict[str, int | float]:
    """Read the folder back: the files' tensors bit for bit, then what they mean to a reader of the configuration.

    Returns:
        Numbers of tensors, of whole weights and of modules (of kv_b_proj by itself, see `merge_first`), and the largest
        relative change of a scaled B: 0 where its scaling stays.

    Raises:
        UserError: it is not what was written.
    """
    again = open_adapter(folder, skeleton)
    stored = adapter_tensors(folder, str(adapter_format(folder)))
    wrong = [
        name
        for name in stored.keys() | tensors.keys()
        if name not in stored or name not in tensors or not np.array_equal(stored[name].read(), tensors[name])
    ]
    wrong += [path for path in weights if not np.array_equal(again.weights[path].read(), weights[path].read())]
    if wrong:
        raise UserError(f"the export was refused: {len(wrong)} tensors read back otherwise ({'; '.join(wrong[:5])})")
    change = 0.0
    found = slots(skeleton)
    for slot in {slot.factor: slot for slot in found.values() if slot.group in adapter.settings.groups}.values():
        change = max(change, _change(slot, adapter, again))
    if not change <= _ROUNDING:
        raise UserError(f"the export was refused: a module's A or scaled B changed by {change:.1e} of its value")
    modules = [module for module, slot in found.items() if slot.group in adapter.settings.groups]
    return {
        "tensors": len(stored),
        "whole_weights": len(weights),
        "modules": len(modules),
        "kv_b_proj_modules": sum(module.endswith(".kv_b_proj") for module in modules),
        "largest_change": change,
    }


def _change(slot: Slot, ours: Adapter, theirs: Adapter) -> float:
    """Largest change of an entry of scaling * B, relative to the entry; infinite when A or what was added differs."""
    group = slot.group
    rank = ours.settings.rank_of(group)
    (a, b), (new_a, new_b) = ([x.factor(f"{slot.factor}_{letter}") for letter in "AB"] for x in (ours, theirs))
    if not np.array_equal(a, new_a[..., :rank]) or new_a[..., rank:].any() or new_b[..., rank:, :].any():
        return np.inf
    before, after = (
        x.astype(np.float64) * s.scaling_of(group)
        for x, s in ((b, ours.settings), (new_b[..., :rank, :], theirs.settings))
    )
    return float((np.abs(after - before) / np.where(before == 0, 1.0, np.abs(before))).max())


def merge_first(report: ExportReport) -> str:
    """What a user of an exported adapter must call before anything else; empty where nothing.

    The latent attention of Small and the full model reads `kv_b_proj.weight` itself, in the official code and in
    PaddleMIX: the adapter of an unmerged model is passed by there, and the answers are wrong without a word.
    """
    if not report.verified["kv_b_proj_modules"]:
        return ""
    code, call = ("the official code", "merge_and_unload()") if report.adapter == PEFT else ("PaddleMIX", "merge()")
    return f"call {call} after loading it: {code} reads kv_b_proj.weight past an adapter that is not merged"
