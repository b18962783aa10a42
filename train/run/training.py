"""The training run: `bash launch.sh conf=RECIPE key=value ...`.

Everything that can be wrong is looked at before anything in run_dir is changed.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import nn
from paddlenlp.trainer import TrainerCallback

from data.packs import PackDataset
from train.ask.evaluate import ask_run
from train.ask.load import Loaded
from train.ask.source import Source, check_model, check_trained
from train.config.compose import to_yaml
from train.config.load import check_divides, load_config, rehearsal_notice
from train.config.schema import TrainConfig
from train.machine.devices import check_precision, use_device
from train.page.page import make_page, write_page
from train.page.sources import unread_notes
from train.run.barrier import barrier
from train.run.build import build_base, count_parts, make_trainable, open_base
from train.run.build_data import Data, build_data
from train.run.curve import draw_curve
from train.run.gradients import gather_rows
from train.run.identity import fingerprint_of_records, identity
from train.run.memory import check_published, check_training
from train.run.metrics import MetricsLog
from train.run.next_commands import next_commands
from train.run.report import StartReport, memory_words, plan_words, run_words, start_report, start_text
from train.run.resume import choose_wandb_id, find_resumed, leave_later_checkpoints
from train.run.say import say
from train.run.state import load_trained, save_state, save_trained, trained_folder
from train.run.stop import WORKER_KILLED, StopRequest
from train.run.summary import end_text, summarise
from train.run.trainer import VL2Trainer
from train.store.checkpoints import checkpoint_path, prune
from train.store.facts import write_fact
from train.store.hub import resolve_model
from train.store.names import CHECKPOINTS, CONFIG_FILE, CURVE, METRICS, PAGE, REPORT, SUMMARY
from train.store.overwrite import removable, remove
from train.store.provenance import Provenance, absolute_folder
from train.store.run_dir import RunMarker, check_run_dir, hold_run_dir, read_marker, update_marker, write_marker
from train.store.run_state import History, Identity
from train.store.versions import versions
from train.store.whole_folder import write_folder
from vl2.checkpoint.fingerprint import model_fingerprint
from vl2.dtypes import DTYPE_OF_SETTING
from vl2.lora import VL2LoRAModel

Built = TypeVar("Built")
# Asks a model the held-out questions, "before" or "after" training: numbers with at least `exact_match` in [0, 1].
Evaluate = Callable[[nn.Layer, Data, TrainConfig, str], Mapping[str, float]]


def main(arguments: list[str]) -> int:
    """Entry script: 0 finished, 1 diverged or a data worker killed, 2 a mistake in the input, 128 + signal stopped."""
    config = load_config(arguments)
    notice = rehearsal_notice(config, arguments) if config.rehearsal else ""
    try:
        return train(config, notice=notice)
    except FloatingPointError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1


def ask_held_out(model: nn.Layer, data: Data, config: TrainConfig, when: str) -> Mapping[str, float]:
    """Greedy answers to the held-out questions; after training also with the pictures exchanged."""
    lora = isinstance(model, VL2LoRAModel)
    inner = model.model if lora else model
    model.eval()
    source = Source(kind="adapter" if lora else "weights", base=Path(config.model.path))
    return ask_run(
        Loaded(source=source, model=inner, tokenizer=data.tokenizer, images=data.images),
        data.questions,
        limit=config.eval.questions,
        max_new_tokens=config.eval.max_new_tokens,
        permute=config.eval.permuted and when == "after",
    )


def train(
    config: TrainConfig,
    *,
    evaluate: Evaluate | None = ask_held_out,
    notice: str = "",
    callbacks: Sequence[TrainerCallback] = (),
) -> int:
    """Run, or go on with, one training.

    Args:
        config: of the run.
        evaluate: asks the held-out questions; None asks nothing.
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
    say(notice)
    with hold_run_dir(Path(config.run_dir)) if dist.get_rank() == 0 else nullcontext():
        return _train(config, evaluate, notice, callbacks)


def _train(config: TrainConfig, evaluate: Evaluate | None, notice: str, callbacks: Sequence[TrainerCallback]) -> int:
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
    base = build_base(config, folder)
    fingerprint = model_fingerprint(base)
    who = identity(config, fingerprint=fingerprint, tokenizer=data.tokenizer, plan=data.plan)
    model, groups = make_trainable(base, config, candidates=data.candidates, base_fingerprint=fingerprint)
    resumed = find_resumed(
        config, who, data.plan.num_steps, lambda: fingerprint_of_records(data.dataset, data.tokenizer)
    )
    checkpoint = resumed.checkpoint if resumed else None
    first_step, history = (resumed.state.step, resumed.state.history) if resumed else (0, History())
    wandb_id = choose_wandb_id(resumed, previous)

    # 2. Claim the folder, say what will happen.
    report = start_report(config, data, parts=count_parts(model), groups=groups, num_ranks=dist.get_world_size())
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
        )
        write_marker(run_dir, marker)
        (run_dir / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")
        write_fact(run_dir / REPORT, report)
        write_page(run_dir / PAGE, start_page(config, report, data))
        print(f"{to_yaml(config)}\n{start_text(report, config.run_dir)}", flush=True)
    for note in unread_notes(data.dataset):
        say(f"note: {note}", sys.stderr)
    for error in data.dataset.skipped[:10]:
        say(f"skipped: {error}", sys.stderr)
    if data.held_out and data.held_out.note:
        say(f"note: {data.held_out.note}", sys.stderr)

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
        step=None,
        versions=versions(),
    )
    before = _evaluate_once("before", evaluate, model, data, config)
    barrier()
    if first_step == data.plan.num_steps and checkpoint is not None:
        say(f"already at step {first_step} of {first_step}; raise max_steps or epochs to train further")
        load_trained(model, trained_folder(checkpoint, model))
    elif code := _fit(config, data, model, who, provenance, checkpoint, first_step, history, wandb_id, callbacks):
        return code

    # 4. Keep the result, ask again, sum up.
    final = trained_folder(run_dir, model)
    if first:
        write_folder(final, lambda folder: save_trained(model, folder, provenance))
    model.eval()
    after = _evaluate_once("after", evaluate, model, data, config)
    if first:
        draw_curve(run_dir / METRICS, run_dir / CURVE, title=f"{config.recipe}, {config.model.path}")
        summary = summarise(config, history, before=before, after=after, trained=final)
        write_fact(run_dir / SUMMARY, summary)
        update_marker(run_dir, status="finished", step=len(history.losses))  # fewer when a callback stopped it
        print("\n" + end_text(summary), flush=True)
        commands = next_commands(config.run_dir, data.questions or data.dataset.records)
        print(f"\nWhat can be typed now:\n{commands}", flush=True)
    barrier()
    say(notice)
    return 0


def _fit(
    config: TrainConfig,
    data: Data,
    model: nn.Layer,
    who: Identity,
    provenance: Provenance,
    checkpoint: Path | None,
    first_step: int,
    history: History,
    wandb_id: str,
    callbacks: Sequence[TrainerCallback],
) -> int:
    """The optimizer steps. Returns the exit code of what stopped them, 0 when they came to their end."""
    run_dir, first = Path(config.run_dir), dist.get_rank() == 0
    root = run_dir / CHECKPOINTS

    def save(trainer: VL2Trainer) -> None:
        step = trainer.state.global_step
        if first:

            def write(folder: Path) -> None:
                save_state(
                    folder,
                    model=model,
                    optimizer=trainer.optimizer,
                    step=step,
                    identity=who,
                    history=history,
                    provenance=replace(provenance, step=step),
                    config_yaml=to_yaml(config),
                    wandb_id=wandb_id,
                    scaler=trainer.scaler.state_dict() if trainer.scaler is not None else None,
                )
                trainer.state.save_to_json(str(folder / "trainer_state.json"))

            write_folder(checkpoint_path(root, step), write)
            prune(root, config.keep_checkpoints)
            update_marker(run_dir, step=step)
        barrier()

    log: MetricsLog | None = None
    if first:
        log = MetricsLog(run_dir, config, num_steps=data.plan.num_steps, first_step=first_step, wandb_id=wandb_id)
    packs = PackDataset(
        data.dataset.records,
        data.plan,
        data.dataset.sizes,
        data.tokenizer,
        data.candidates,
        images=data.images,
        num_ranks=dist.get_world_size(),
        on_bad_record=config.data.on_bad_record,  # type: ignore[arg-type]  # checked by the schema
        max_bad=config.data.max_bad,
    )
    with StopRequest() as stop:
        trainer = VL2Trainer(
            model,
            config=config,
            plan=data.plan,
            dataset=packs,
            stop=stop,
            on_step=log.write if log else lambda metrics: None,
            save=save,
            history=history,
            sources=data.sources,
            callbacks=callbacks,
        )
        try:
            barrier()  # wandb may have kept rank 0
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            trainer.close()
            if log is not None:
                log.close()
        # Once more, for a signal that came after the last step had agreed.
        code = int(gather_rows(np.array([[stop.code]], dtype="float64")).max())
    if code:
        step = trainer.state.global_step
        if first:
            update_marker(run_dir, status="stopped", step=step)
        saved = f"after step {step} of {data.plan.num_steps}; saved {checkpoint_path(root, step)}"
        goes_on = "The same command with resume=auto goes on"
        if code == WORKER_KILLED:
            cause = f"a data worker was killed (out of memory?; data.workers={config.data.workers}, fewer take less)"
            say(f"error: stopped {saved}: {cause}. {goes_on}", sys.stderr)
        else:
            say(f"\nstopped by {signal.Signals(code - 128).name} {saved}. {goes_on}")
    return code


def _evaluate_once(
    when: str, evaluate: Evaluate | None, model: nn.Layer, data: Data, config: TrainConfig
) -> dict[str, float] | None:
    """Ask the held-out questions on rank 0; what a run was asked before training is kept through its interruptions."""
    if evaluate is None or not data.questions or dist.get_rank() != 0:
        return None
    run_dir = Path(config.run_dir)
    marker = read_marker(run_dir)
    assert marker is not None  # written when the run claimed its folder
    kept = marker.evaluation
    if when == "before" and when in kept:
        return kept[when]
    started = time.perf_counter()
    found = dict(evaluate(model, data, config, when))
    update_marker(run_dir, evaluation={**kept, when: found})
    say(
        f"{when} training: {found['exact_match']:.1%} of the held-out answers are right "
        f"({time.perf_counter() - started:.0f} s)"
    )
    if found.get("cut"):
        say(
            f"note: {found['cut']:.0f} of {found['questions']:.0f} answers were cut at "
            f"eval.max_new_tokens={config.eval.max_new_tokens}, before they had ended",
            sys.stderr,
        )
    return found


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
