"""`bash launch.sh export run=FOLDER`: a whole checkpoint of what was trained, merged in float32, verified, then named.

Written tensor by tensor and verified layer by layer: neither base nor export is ever in memory as a whole.
`model=FOLDER` writes a model in which nothing was trained, in another layout or type.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from train.ask.processor import exif_in_force
from train.ask.source import Source, find_source
from train.config.load import default_export, load_export_config
from train.config.schema import ExportConfig
from train.export.adapter import export_adapter, merge_first
from train.export.card import card, write_card
from train.export.folder import check_out, plan_export, write_companions, write_weights
from train.export.merge import Merge, open_merge
from train.export.verify import make_probe, verify_logits, verify_tensors
from train.machine.devices import use_device
from train.machine.disk import check_disk
from train.store.checkpoints import chosen_checkpoint
from train.store.facts import write_fact
from train.store.hub import resolve_model
from train.store.names import EXPORT_REPORT
from train.store.provenance import ExportReport
from train.store.versions import versions
from train.store.whole_folder import write_folder
from vl2.checkpoint.layouts import Layout
from vl2.checkpoint.model_folder import open_folder
from vl2.checkpoint.planned_files import Plan
from vl2.dtypes import DTYPE_OF_SETTING
from vl2.errors import UserError


def main(arguments: list[str]) -> int:
    """Entry script."""
    config = load_export_config(arguments)
    config.run = chosen_checkpoint(config.run, config.checkpoint)
    config.out = config.out or default_export(config.run, config.adapter)
    use_device(config.device)
    report = export(config)
    print(f"exported to {config.out}")
    for key, value in {**report.verified, **(report.cost or {})}.items():
        print(f"  {key:32} {value:.3g}" if isinstance(value, float) else f"  {key:32} {value}")
    if report.rehearsal:
        print("note: this export comes from a rehearsal on nano")
    if report.adapter and (advice := merge_first(report)):
        print(f"note: {advice}")
    return 0


def export(config: ExportConfig) -> ExportReport:
    """Write and verify one export.

    Returns:
        What export.json says: where it comes from, what was verified, and what it cost.

    Raises:
        UserError: `out` holds something, `run` holds nothing trained, there is no room on the disk, or the export is
            not what it should be (then nothing stands under its name).
    """
    if config.adapter:
        return export_adapter(config)
    source, out = _find(config), Path(config.out)
    layout: Layout = "paddle" if config.layout == "paddle" else "hf"
    check_out(out, source, overwrite=config.overwrite)
    merge = open_merge(source, None if config.dtype == "base" else DTYPE_OF_SETTING[config.dtype])
    plan = plan_export(merge, layout)
    check_disk(out, plan.num_bytes, "the export")
    report = ExportReport(
        run=config.run or config.model,
        base=str(source.base),
        kind=source.kind,
        adapter=None,
        layout=layout,
        dtype=merge.dtype_name,
        rehearsal=source.rehearsal,
        frozen=source.frozen,  # type: ignore[arg-type]
        recipe=source.recipe,
        step=source.step,
        versions=versions(),
        verified={},
        cost=None,
        exif=exif_in_force(source),
    )

    def write(folder: Path) -> None:
        nonlocal report
        started = time.perf_counter()
        write_companions(folder, source, merge)  # first: a broken file of the base is said before all is written
        with _bar("merge and write", plan.num_bytes) as bar:
            write_weights(folder, merge, plan, layout, bar.update)
        written = time.perf_counter()
        verified = verify(folder, merge, plan)
        cost = {
            "gigabytes": plan.num_bytes / 1e9,
            "write_seconds": written - started,
            "verify_seconds": time.perf_counter() - written,
            "peak_memory_gigabytes": _peak_memory() / 1e9,
        }
        report = replace(report, verified=verified, cost=cost)
        write_fact(folder / EXPORT_REPORT, report)
        if source.trained is not None:
            write_card(folder, out, card(report, source))

    write_folder(out, write)
    return report


def _find(config: ExportConfig) -> Source:
    if config.run:
        source = find_source(config.run, config.base, checksums=config.check == "full")
        if source.trained is None:
            raise UserError(
                f"run={config.run}: nothing was trained there; it is a base model or an export already. To write it in "
                f"another layout or type: export model={config.run} layout=... out=FOLDER"
            )
        return source
    source = find_source(resolve_model(config.model), checksums=config.check == "full")
    if source.trained is not None:
        raise UserError(f"model={config.model}: weights were trained there; give run={config.model} to export them")
    return source


def verify(folder: Path, merge: Merge, plan: Plan) -> dict[str, Any]:
    """Read an export back as everybody will, and compare: (a) tensors, (b) the merge, (c) the rounding.

    Returns:
        The figures.

    Raises:
        UserError: when it is not what it should be.
    """
    try:
        opened = open_folder(folder)
        written = opened.weights
    except ValueError as problem:
        raise UserError(f"the export was refused: it cannot be read back: {problem}") from problem
    with _bar("verify tensors", plan.num_bytes) as bar:
        tensors = verify_tensors(written, merge, bar.update)
    probe = make_probe(opened.tokenizer, opened.config.candidate_resolutions)

    def passes(models: list[Any]) -> tqdm:
        return tqdm(models, desc="verify logits", unit="model", file=sys.stderr)

    return {**tensors, "probe_tokens": len(probe["input_ids"]), **verify_logits(written, merge, probe, passes)}


def _bar(title: str, num_bytes: int) -> tqdm:
    return tqdm(total=num_bytes, desc=title, unit="B", unit_scale=True, file=sys.stderr, mininterval=1.0)


def _peak_memory() -> int:
    """Most bytes this process had in memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
