"""`bash launch.sh dryrun conf=RECIPE key=value ...`: what training would learn from, and all that it would refuse.

Takes the keys of training, loads no weights, and changes nothing in run_dir but the page it writes.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import paddle

from data.record import BadRecords
from train.ask.model_memory import inference_memory
from train.ask.source import check_model, check_trained
from train.config.load import load_config
from train.config.schema import TrainConfig
from train.machine.devices import check_precision, use_device
from train.machine.memory import gigabytes
from train.page.render import write_page
from train.page.sources import unread_notes
from train.run.build import check_settings, lora_settings
from train.run.build_data import build_data
from train.run.dry_report import DryRun, dry_page, dry_text
from train.run.memory import check_training, plan_parts, training_memory
from train.run.report import plan_facts
from train.run.vision_cache import look
from train.store.hub import missing_files, resolve_model
from train.store.names import DRYRUN_PAGE, PAGE
from train.store.run_dir import check_run_dir, read_marker
from vl2.adapter.folder import open_adapter
from vl2.checkpoint.model_folder import ModelFolder, open_folder
from vl2.checkpoint.published import published
from vl2.config import VL2Config
from vl2.dtypes import DTYPE_OF_SETTING
from vl2.errors import UserError
from vl2.parameters import build_model

MOST_LISTED = 5000  # bad rows; reading stops there
_MOST_SAID = 10  # of them on the terminal
_REHEARSED = (
    "counted for nano. Exact: pictures, image tokens and tiles. Not: text tokens, and so packs and steps, which are "
    "counted with nano's tokenizer; and bytes, which are nano's"
)

Found = TypeVar("Found")


def main(arguments: list[str]) -> int:
    """Entry script: 0 training would start, 2 it would refuse."""
    config = load_config(arguments)
    use_device(config.device)
    if config.rehearsal:
        print(rehearsal_note(arguments), flush=True)
    with tempfile.TemporaryDirectory(prefix="dryrun-") as drawn:
        found = dry_run(config, Path(drawn))
        print(dry_text(found), flush=True)
        if found.page:
            write_page(found.page, dry_page(found))
    for error in found.bad[:_MOST_SAID]:
        print(f"bad row: {error}", file=sys.stderr)
    if len(found.bad) > _MOST_SAID:
        print(f"... and {len(found.bad) - _MOST_SAID:,} more bad rows", file=sys.stderr)
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    for reason in found.reasons:
        print(f"error: training would refuse: {reason}", file=sys.stderr)
    where = f"all of it: {found.page}" if found.page else "no page is written into a folder of other files"
    print("training would refuse this" if found.reasons else "training would start", f"({where})", flush=True)
    return 2 if found.reasons else 0


def dry_run(config: TrainConfig, drawn: Path) -> DryRun:
    """Look at everything that training looks at before its first step, and go on after a fault.

    Args:
        config: of the run.
        drawn: empty folder for the pictures of shapes, where there is no data.path.
    """
    refused: list[str] = []
    notes: list[str] = [_REHEARSED] if config.rehearsal else []

    def attempt(look: Callable[[], Found]) -> Found | None:
        try:
            return look()
        except UserError as problem:
            refused.append(str(problem))
            return None

    run_dir = Path(config.run_dir)
    attempt(lambda: check_run_dir(run_dir, resume=config.resume, overwrite=config.overwrite))
    page = page_place(run_dir, free=not refused)
    # A published model's config is part of this repository: its bytes can be told where nothing can be fetched.
    known = published(config.model.path)
    folder = attempt(lambda: open_folder(resolve_model(config.model.path, weights=False)))
    model = folder.config if folder else VL2Config.from_folder(known.config.parent) if known else None
    counted = need = None
    attempt(lambda: check_precision(DTYPE_OF_SETTING[config.precision]))
    if model:
        sharing = 1 if paddle.get_device().startswith("gpu") else config.nproc
        attempt(lambda: check_training(config, model, sharing))
        counted = attempt(lambda: plan_parts(model, config))
        need = attempt(lambda: training_memory(model, config))
    if folder:
        check_weights(config, folder, attempt, notes)
    if folder and config.lora.init:
        attempt(lambda: check_initial_adapter(config, folder))
        notes.append(
            f"not compared: whether lora.init={config.lora.init} was trained on this base, which needs weights"
        )
    if config.resume:
        notes.append(f"not compared: the checkpoint of resume={config.resume}, which needs weights")

    rows, questions = (BadRecords(on_bad_record="skip", max_bad=MOST_LISTED) for _ in range(2))
    data = None
    if folder:
        try:
            data = build_data(replace(config, run_dir=str(drawn)), folder, bad=rows, bad_questions=questions)
        except UserError as problem:
            many = max(len(rows.skipped), len(questions.skipped)) > MOST_LISTED
            refused.append(f"more than {MOST_LISTED:,} bad rows; reading stopped there" if many else str(problem))
    allowed = config.data.max_bad if config.data.on_bad_record == "skip" else 0
    if data:
        notes.extend(unread_notes(data.dataset))
    if data and data.held_out and data.held_out.note:
        notes.append(data.held_out.note)
    if folder and data and config.data.vision_cache and not missing_files(folder.path):
        found = attempt(lambda: look(config, folder, data))
        notes.extend([found.words()] if found else [])
    return DryRun(
        config=config,
        page=page,
        refused=tuple(dict.fromkeys(refused)),
        notes=tuple(notes),
        bad=tuple([*rows.skipped, *questions.skipped][:MOST_LISTED]),
        bad_is_refused=max(len(rows.skipped), len(questions.skipped)) > allowed,
        tokenizer=folder.tokenizer if folder else None,
        parts=counted[0] if counted else None,
        groups=counted[1] if counted else (),
        need=need,
        data=data,
        plan=plan_facts(data) if data else None,
    )


def page_place(run_dir: Path, *, free: bool) -> Path | None:
    """Where the page goes: beside the run that lies there, with a name of its own, or where a new run would put it.

    Args:
        run_dir: of the configuration.
        free: a new run could take it.

    Returns:
        None where the folder is somebody else's.
    """
    try:
        there = read_marker(run_dir)
    except UserError:
        return None
    return run_dir / DRYRUN_PAGE if there else run_dir / PAGE if free else None


def check_weights(
    config: TrainConfig,
    folder: ModelFolder,
    attempt: Callable[[Callable[[], object]], object],
    notes: list[str],
) -> None:
    """Compare names and shapes of the base's files with its config, without reading a weight.

    Args:
        config: of the run.
        folder: of the base model.
        attempt: keeps what is wrong.
        notes: told when the weights have still to be fetched.
    """
    attempt(lambda: check_model(folder.path, checksums=False))
    if config.model.init == "random":
        return
    if not Path(config.model.path).is_dir() and missing_files(folder.path):
        size = gigabytes(inference_memory(folder.config, "bfloat16"))
        notes.append(f"the weights of {config.model.path} are not here: training fetches them, {size} in bfloat16")
        return
    attempt(lambda: folder.weights)


def check_initial_adapter(config: TrainConfig, folder: ModelFolder) -> None:
    """Compare the adapter that training starts from with the model and the run's settings.

    Raises:
        UserError: it is not as it was written, or does not fit.
    """
    check_trained(Path(config.lora.init))
    adapter = open_adapter(config.lora.init, build_model(folder.config, folder.tokenizer.image_id))
    check_settings(adapter.settings, lora_settings(config), config.lora.init)


def rehearsal_note(arguments: Sequence[str]) -> str:
    """What a dry run on nano is, and the command that counts for the recipe's model."""
    kept = [argument for argument in arguments if not argument.startswith("rehearse=")]
    return (
        "REHEARSAL: counted for the nano model. For the recipe's own, of which config and tokenizer are fetched, no "
        f"weights:\n  bash launch.sh dryrun {shlex.join([*kept, 'rehearse=false'])}"
    )
