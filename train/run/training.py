"""The training run: `bash launch.sh conf=RECIPE key=value ...`.

Everything that can be wrong is looked at before anything in run_dir is changed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn
from paddlenlp.trainer import TrainerCallback

from train.ask.source import check_model, check_trained
from train.config.compose import to_yaml
from train.config.load import check_divides, load_config, rehearsal_notice
from train.config.schema import TrainConfig
from train.machine.devices import check_precision, use_device
from train.page.page import make_page
from train.page.render import write_page
from train.page.sources import unread_notes
from train.run.agreement import check_same_settings, check_seen_by_all
from train.run.barrier import barrier
from train.run.best import carried_over
from train.run.build import base_fingerprint, build_base, count_parts, make_trainable, open_base, share_layers
from train.run.build_data import Data, build_data
from train.run.fit import fit
from train.run.identity import fingerprint_of_records, identity
from train.run.memory import check_published, check_training, training_memory
from train.run.next_commands import next_commands
from train.run.report import StartReport, memory_words, plan_words, run_words, start_report
from train.run.resume import choose_wandb_id, find_resumed, leave_later_checkpoints
from train.run.say import say
from train.run.shard.group import shard_degree
from train.run.start_screen import start_screen
from train.run.state import load_trained, save_trained, trained_folder, trained_values
from train.run.stop import PeerLost
from train.run.summary import end_text, summarise
from train.run.validation import Validation
from train.run.vision_cache import open_vision_cache
from train.run.watch.log import open_log
from train.store.facts import write_fact
from train.store.hub import resolve_model
from train.store.names import CONFIG_FILE, MARKER, PAGE, REPORT, SUMMARY
from train.store.overwrite import removable, remove
from train.store.provenance import Provenance, absolute_folder
from train.store.run_dir import RunMarker, check_run_dir, hold_run_dir, update_marker, write_marker
from train.store.run_state import History
from train.store.versions import versions
from train.store.whole_folder import write_folder
from vl2.dtypes import DTYPE_OF_SETTING
from vl2.errors import UserError

Built = TypeVar("Built")
_LONGEST_REASON = 300  # characters


def main(arguments: list[str]) -> int:
    """Entry script: 0 finished, 1 diverged or a process is gone, 2 a mistake in the input, else `StopRequest.code`."""
    config = load_config(arguments)
    notice = rehearsal_notice(config, arguments) if config.rehearsal else ""
    try:
        return train(config, notice=notice)
    except (FloatingPointError, PeerLost) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1


def train(
    config: TrainConfig,
    *,
    validate: bool = True,
    notice: str = "",
    callbacks: Sequence[TrainerCallback] = (),
) -> int:
    """Run, or go on with, one training.

    Args:
        config: of the run.
        validate: on the held-out rows; False asks them nothing.
        notice: said first and last.
        callbacks: of PaddleNLP's Trainer; what they ask for (a save, a stop) is done after the step.

    Returns:
        Exit code, see `main`.

    Raises:
        UserError: anything wrong with the input; nothing in run_dir was overwritten then.
        FloatingPointError: when the loss or a gradient is not finite.
    """
    use_device(config.device, tf32=config.tf32, deterministic=config.deterministic)
    check_precision(DTYPE_OF_SETTING[config.precision])
    _quieten()
    if dist.get_world_size() > 1 and not dist.is_initialized():
        dist.init_parallel_env()
    check_divides(config.packs_per_step, dist.get_world_size())
    check_same_settings(config)
    say(notice)
    with hold_run_dir(Path(config.run_dir)) if dist.get_rank() == 0 else nullcontext():
        return _train(config, validate, notice, callbacks)


def _train(config: TrainConfig, validate: bool, notice: str, callbacks: Sequence[TrainerCallback]) -> int:
    """`train` in a run_dir that is ours alone."""
    run_dir, first = Path(config.run_dir), dist.get_rank() == 0

    # 1. Look at everything. Rank 0 draws and measures, the others read what it kept.
    previous = None
    if first:
        previous = check_run_dir(run_dir, resume=config.resume, overwrite=config.overwrite)
        sharing = 1 if paddle.get_device().startswith("gpu") else config.nproc
        check_published(config, sharing)
        check_model(resolve_model(config.model.path), checksums=False)
        if config.lora.init:
            check_trained(Path(config.lora.init))
    folder = _first_rank_first(lambda: open_base(config))
    if first:
        check_training(config, folder.config, sharing)
    data = _first_rank_first(lambda: build_data(config, folder))
    vision = open_vision_cache(config, folder, data)
    data, tower = replace(data, vision_cache=vision.cache), not vision.is_whole
    base = build_base(config, folder, tower=tower)
    fingerprint = base_fingerprint(config, folder, base, tower=tower)
    who = identity(config, fingerprint=fingerprint, tokenizer=data.tokenizer, plan=data.plan)
    resumed = find_resumed(
        config, who, data.plan.num_steps, lambda: fingerprint_of_records(data.dataset, data.tokenizer)
    )
    model, groups = make_trainable(
        base, config, candidates=data.candidates, base_fingerprint=fingerprint, resumed=resumed is not None
    )
    shared = share_layers(model, config)
    checkpoint = resumed.checkpoint if resumed else None
    first_step, history = (resumed.state.step, resumed.state.history) if resumed else (0, History())
    validated = carried_over(resumed, config)
    wandb_id = choose_wandb_id(resumed, previous)

    # 2. Claim the folder, say what will happen.
    need = training_memory(folder.config, config, tower=tower)
    counted = count_parts(model)
    report = start_report(config, data, need=need, parts=counted, groups=groups, num_ranks=dist.get_world_size())
    barrier()  # all have looked at the checkpoints
    if first:
        if previous and config.overwrite:
            remove(removable(run_dir, previous.wandb_id), run_dir)
        if resumed:
            leave_later_checkpoints(resumed, run_dir)
        asked = previous.evaluation if previous and resumed else {}
        marker = RunMarker(
            recipe=config.recipe,
            rehearsal=config.rehearsal,
            status="running",
            step=first_step,
            steps=data.plan.num_steps,
            wandb_id=wandb_id,
            evaluation={when: numbers for when, numbers in asked.items() if when == "before"},
            best=validated.best if validated else None,
        )
        write_marker(run_dir, marker)
        (run_dir / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")
        write_fact(run_dir / REPORT, report)
        write_page(run_dir / PAGE, start_page(config, report, data))
        print(start_screen(config, report, first_step=first_step), flush=True)
    barrier()
    if shard_degree(config) > 1:
        check_seen_by_all(run_dir / MARKER)
    for note in unread_notes(data.dataset):
        say(f"note: {note}", sys.stderr)
    for error in data.dataset.skipped[:10]:
        say(f"skipped: {error}", sys.stderr)
    if data.held_out and data.held_out.note:
        say(f"warning: {data.held_out.note}", sys.stderr)

    # 3. Train.
    provenance = Provenance(
        recipe=config.recipe,
        rehearsal=config.rehearsal,
        base=config.model.path,
        base_path=absolute_folder(config.model.path),
        base_fingerprint=fingerprint,
        init=config.model.init,  # type: ignore[arg-type]  # checked by the schema
        seed=config.seed,
        max_tiles=config.data.max_tiles,
        exif=config.data.exif,  # type: ignore[arg-type]
        precision=config.precision,  # type: ignore[arg-type]
        frozen=config.model.frozen,  # type: ignore[arg-type]
        step=None,
        versions=versions(),
    )
    log = None
    if first:
        log = open_log(run_dir, config, num_steps=data.plan.num_steps, first_step=first_step, wandb_id=wandb_id)
    with _telling_why(run_dir), log or nullcontext():
        validation = Validation(config, data, model, log, validated, shared) if validate and data.validation else None
        before = validation.before() if validation else None
        owed = validation is not None and validation.owes(first_step)
        if first_step == data.plan.num_steps and checkpoint is not None and not owed:
            say(f"already at step {first_step} of {first_step}; raise max_steps or epochs to train further")
            load_trained(model, trained_folder(checkpoint, model))
        elif code := fit(
            config,
            data,
            model,
            who,
            provenance,
            checkpoint,
            first_step,
            history,
            wandb_id,
            log,
            validation,
            shared,
            callbacks,
        ):
            return code

        # 4. Keep the result, ask again, sum up.
        final = trained_folder(run_dir, model)
        _keep_trained(final, model, provenance, trained_values(model, shared))
        model.eval()
        after = validation.after(len(history.losses)) if validation else None
        best = validation.state.best if validation and validation.state else None
    if first:
        summary = summarise(config, history, before=before, after=after, best=best, trained=final)
        write_fact(run_dir / SUMMARY, summary)
        update_marker(run_dir, status="finished", step=len(history.losses))  # fewer when a callback stopped it
        print("\n" + end_text(summary), flush=True)
        commands = next_commands(config.run_dir, data.questions or data.dataset.records)
        print(f"\nWhat can be typed now:\n{commands}", flush=True)
    barrier()
    say(notice)
    return 0


@contextmanager
def _telling_why(run_dir: Path) -> Iterator[None]:
    """Write down why a run ends with an error, for whoever looks at its folder later."""
    try:
        yield
    except Exception as problem:
        if dist.get_rank() == 0:
            status = "diverged" if isinstance(problem, FloatingPointError) else "failed"
            said = isinstance(problem, (FloatingPointError, UserError, PeerLost))
            why = (str(problem) if said else f"{type(problem).__name__}: {problem}").strip().partition("\n")[0]
            with suppress(OSError, UserError):  # the disk may be what is full
                update_marker(run_dir, status=status, why=why[:_LONGEST_REASON])
        raise


def start_page(config: TrainConfig, report: StartReport, data: Data) -> str:
    """What a run starts with, as a page."""
    return make_page(
        title=config.recipe + (" (rehearsal)" if config.rehearsal else ""),
        words={**run_words(report.run, config.run_dir), **plan_words(report.plan), **memory_words(report.memory)},
        dataset=data.dataset,
        plan=data.plan,
        tokenizer=data.tokenizer,
        reader=data.images,
        bad=[*data.dataset.skipped, *data.skipped_questions],
        notes=unread_notes(data.dataset),
    )


def _keep_trained(folder: Path, model: nn.Layer, provenance: Provenance, values: dict[str, np.ndarray]) -> None:
    if dist.get_rank() == 0:
        write_folder(folder, lambda unfinished: save_trained(model, unfinished, provenance, values))


def _first_rank_first(build: Callable[[], Built]) -> Built:
    built = build() if dist.get_rank() == 0 else None
    barrier()
    return built or build()


def _quieten() -> None:
    """Paddle's and PaddleNLP's notes about their own workings; their errors come through."""
    from paddle.distributed.fleet.utils.log_util import logger as fleet_logger
    from paddlenlp.utils.log import logger as paddlenlp_logger

    paddlenlp_logger.set_level("ERROR")
    # "None of the inputs to current recompute block need grad": true of the first layer, whose adapters do.
    fleet_logger.setLevel(logging.ERROR)
