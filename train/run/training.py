"""The training run: `bash launch.sh conf=RECIPE key=value ...`

Everything that can be wrong is looked at before anything in run_dir is changed.
"""

from __future__ import annotations

import json
import logging
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
import yaml
from paddle import nn

from data.packs import PackDataset
from train.ask.evaluate import ask_run
from train.ask.load import Loaded
from train.ask.source import Source
from train.config.compose import to_yaml
from train.config.load import check_divides, load_config, rehearsal_notice
from train.config.schema import TrainConfig
from train.machine.devices import use_device
from train.run.barrier import barrier
from train.run.build import Data, build_base, build_data, count_parts, make_trainable
from train.run.curve import draw_curve
from train.run.gradients import gather_rows
from train.run.identity import changed_settings, differences, identity
from train.run.memory import check_training
from train.run.metrics import MetricsLog
from train.run.next_commands import next_commands
from train.run.report import end_text, start_report, start_text
from train.run.state import History, load_trained, read_state, save_state, save_trained, trained_folder
from train.run.stop import WORKER_KILLED, StopRequest
from train.run.trainer import VL2Trainer, peak_memory_gb
from train.store.checkpoints import checkpoint_path, find_checkpoint, prune
from train.store.names import CURVE, METRICS
from train.store.provenance import Provenance, absolute_folder
from train.store.run_dir import check_run_dir, clear_run_dir, read_marker, write_marker
from train.store.versions import versions
from train.store.whole_folder import write_folder
from vl2.checkpoint.fingerprint import model_fingerprint
from vl2.errors import UserError
from vl2.lora import VL2LoRAModel

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
        Loaded(source=source, model=inner, tokenizer=data.tokenizer),
        data.questions,
        limit=config.eval.questions,
        max_new_tokens=config.eval.max_new_tokens,
        permute=config.eval.permuted and when == "after",
    )


def train(config: TrainConfig, *, evaluate: Evaluate | None = ask_held_out, notice: str = "") -> int:
    """Run, or go on with, one training.

    Args:
        config: of the run.
        evaluate: asks the held-out questions; None asks nothing.
        notice: said first and last.

    Returns:
        Exit code, see `main`.

    Raises:
        UserError: anything wrong with the input; nothing in run_dir was overwritten then.
        FloatingPointError: when the loss or a gradient is not finite.
    """
    use_device(config.device)
    _quieten()
    if dist.get_world_size() > 1 and not dist.is_initialized():
        dist.init_parallel_env()
    check_divides(config.packs_per_step, dist.get_world_size())
    run_dir, first = Path(config.run_dir), dist.get_rank() == 0
    _say(notice)

    # 1. Look at everything. Rank 0 draws and measures, the others read what it kept.
    if first:
        check_run_dir(run_dir, resume=config.resume, overwrite=config.overwrite)
        check_training(config, 1 if paddle.get_device().startswith("gpu") else config.nproc)
    data = _first_rank_first(lambda: build_data(config))
    base = build_base(config, data.tokenizer)
    fingerprint = model_fingerprint(base)
    who = identity(config, fingerprint=fingerprint, tokenizer=data.tokenizer, plan=data.plan)
    model, groups = make_trainable(base, config, candidates=data.candidates, base_fingerprint=fingerprint)
    checkpoint, state = _checkpoint_to_resume(config, run_dir, who, data.plan.num_steps)
    first_step = state["step"] if state else 0
    history = History(**state["history"]) if state else History()

    # 2. Claim the folder, say what will happen.
    report = start_report(
        config,
        plan=data.plan,
        num_samples=len(data.dataset.records),
        num_skipped=len(data.dataset.skipped),
        parts=count_parts(model),
        groups=groups,
        num_ranks=dist.get_world_size(),
    )
    if first:
        if config.overwrite:
            clear_run_dir(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_marker(run_dir, recipe=config.recipe, rehearsal=config.rehearsal, status="running", step=first_step)
        write_marker(run_dir, steps=data.plan.num_steps, identity=who)
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        (run_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"{to_yaml(config)}\n{start_text(report, config.run_dir)}", flush=True)
    for error in data.dataset.skipped[:10]:
        _say(f"skipped: {error}", sys.stderr)

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
        precision=config.precision,  # type: ignore[arg-type]
        step=None,
        versions=versions(),
    )
    before = _evaluate_once("before", evaluate, model, data, config)
    barrier()
    if first_step == data.plan.num_steps and checkpoint is not None:
        _say(f"already at step {first_step} of {first_step}; raise max_steps or epochs to train further")
        load_trained(model, trained_folder(checkpoint, model))
    elif code := _fit(config, data, model, who, provenance, checkpoint, first_step, history):
        return code

    # 4. Keep the result, ask again, sum up.
    final = trained_folder(run_dir, model)
    if first:
        write_folder(final, lambda folder: save_trained(model, folder, provenance))
    model.eval()
    after = _evaluate_once("after", evaluate, model, data, config)
    if first:
        draw_curve(run_dir / METRICS, run_dir / CURVE, title=f"{config.recipe}, {config.model.path}")
        summary = _summary(
            config, history, before, after, final, checkpoint_path(run_dir / "checkpoints", len(history.losses))
        )
        (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        write_marker(run_dir, status="finished", step=data.plan.num_steps)
        print("\n" + end_text(summary), flush=True)
        commands = next_commands(config.run_dir, data.questions or data.dataset.records)
        print(f"\nWhat can be typed now:\n{commands}", flush=True)
    barrier()
    _say(notice)
    return 0


def _checkpoint_to_resume(
    config: TrainConfig, run_dir: Path, who: Mapping[str, Any], num_steps: int
) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to go on from and its state; (None, None) for a run from the start.

    Raises:
        UserError: nothing whole to resume from, or the checkpoint of another run; says what differs.
    """
    if not config.resume:
        return None, None
    checkpoint, remarks = find_checkpoint(config.resume, run_dir)
    for remark in remarks:
        _say(f"warning: {remark}", sys.stderr)
    state = read_state(checkpoint)
    if found := differences(state["identity"], who):
        listed = "\n  ".join(found)
        raise UserError(
            f"resume={config.resume}: {checkpoint} belongs to another run. What differs:\n  {listed}\n"
            "Give the settings of that run, or start a new one in another run_dir"
        )
    if state["step"] > num_steps:
        raise UserError(
            f"resume={config.resume}: {checkpoint} is at step {state['step']}, but this run has {num_steps} steps; "
            "raise max_steps or epochs"
        )
    _say(f"going on from {checkpoint} (step {state['step']} of {num_steps})")
    for change in changed_settings(yaml.safe_load((checkpoint / "config.yaml").read_text("utf-8")), asdict(config)):
        _say(f"note: {change}; steps from here on follow the new value", sys.stderr)
    return checkpoint, state


def _fit(
    config: TrainConfig,
    data: Data,
    model: nn.Layer,
    who: Mapping[str, Any],
    provenance: Provenance,
    checkpoint: Path | None,
    first_step: int,
    history: History,
) -> int:
    """The optimizer steps. Returns the exit code of what stopped them, 0 when they came to their end."""
    run_dir, first = Path(config.run_dir), dist.get_rank() == 0
    root = run_dir / "checkpoints"

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
                    scaler=trainer.scaler.state_dict() if trainer.do_grad_scaling else None,
                )
                trainer.state.save_to_json(str(folder / "trainer_state.json"))

            write_folder(checkpoint_path(root, step), write)
            prune(root, config.keep_checkpoints)
            write_marker(run_dir, step=step)
        barrier()

    log: MetricsLog | None = None
    if first:
        wandb_id = (read_marker(run_dir) or {}).get("wandb_id") or secrets.token_hex(4)
        write_marker(run_dir, wandb_id=wandb_id)
        log = MetricsLog(run_dir, config, num_steps=data.plan.num_steps, first_step=first_step, wandb_id=wandb_id)
    packs = PackDataset(
        data.dataset.records,
        data.plan,
        data.dataset.sizes,
        data.tokenizer,
        data.candidates,
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
            write_marker(run_dir, status="stopped", step=step)
        saved = f"after step {step} of {data.plan.num_steps}; saved {checkpoint_path(root, step)}"
        goes_on = "The same command with resume=auto goes on"
        if code == WORKER_KILLED:
            cause = f"a data worker was killed (out of memory?; data.workers={config.data.workers}, fewer take less)"
            _say(f"error: stopped {saved}: {cause}. {goes_on}", sys.stderr)
        else:
            _say(f"\nstopped by {signal.Signals(code - 128).name} {saved}. {goes_on}")
    return code


def _evaluate_once(
    when: str, evaluate: Evaluate | None, model: nn.Layer, data: Data, config: TrainConfig
) -> dict[str, float] | None:
    """Ask the held-out questions on rank 0; what a run was asked before training is kept through its interruptions."""
    if evaluate is None or not data.questions or dist.get_rank() != 0:
        return None
    run_dir = Path(config.run_dir)
    kept = (read_marker(run_dir) or {}).get("evaluation", {})
    if when == "before" and when in kept:
        return kept[when]
    started = time.perf_counter()
    found = dict(evaluate(model, data, config, when))
    write_marker(run_dir, evaluation={**kept, when: found})
    _say(
        f"{when} training: {found['exact_match']:.1%} of the held-out answers are right "
        f"({time.perf_counter() - started:.0f} s)"
    )
    return found


def _summary(
    config: TrainConfig,
    history: History,
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    final: Path,
    checkpoint: Path,
) -> dict[str, Any]:
    run_dir = Path(config.run_dir)
    return {
        "recipe": config.recipe,
        "rehearsal": config.rehearsal,
        "model": config.model.path,
        "steps": len(history.losses),
        "loss_first": history.losses[0],
        "loss_last": history.losses[-1],
        "losses": history.losses,
        "accuracy_before": before["exact_match"] if before else None,
        "accuracy_after": after["exact_match"] if after else None,
        "accuracy_with_pictures_exchanged": (after or {}).get("exact_match_permuted"),
        "evaluation": {"before": before, "after": after},
        "tokens": history.tokens,
        "seconds": history.seconds,
        "tokens_per_second": history.tokens / history.seconds,
        "peak_memory_gb": peak_memory_gb(),
        "paths": {
            "run_dir": str(run_dir),
            final.name: str(final),
            "checkpoint": str(checkpoint),
            "metrics": str(run_dir / METRICS),
            "curve": str(run_dir / CURVE) if (run_dir / CURVE).is_file() else None,
            "config": str(run_dir / "config.yaml"),
        },
        "versions": versions(),
    }


def _first_rank_first(build: Callable[[], Data]) -> Data:
    built = build() if dist.get_rank() == 0 else None
    barrier()
    return built or build()


def _say(text: str, file=None) -> None:
    if text and dist.get_rank() == 0:
        print(text, file=file or sys.stdout, flush=True)


def _quieten() -> None:
    """Paddle's and PaddleNLP's notes about their own workings; their errors come through."""
    from paddle.distributed.fleet.utils.log_util import logger as fleet_logger
    from paddlenlp.utils.log import logger as paddlenlp_logger

    paddlenlp_logger.set_level("ERROR")
    # "None of the inputs to current recompute block need grad": true of the first layer, whose adapters do.
    fleet_logger.setLevel(logging.ERROR)
