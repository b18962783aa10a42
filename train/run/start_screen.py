"""What a run says when it starts: what it will do and where to look, on one screen; the rest is in its folder."""

from __future__ import annotations

import textwrap

from train.config.schema import TrainConfig
from train.run.report import PlanFacts, StartReport, count_text, memory_words, plan_words, run_words
from train.run.watch.curve import short_name
from train.store.names import CHECKPOINTS, CONFIG_FILE, CURVE, METRICS, PAGE, VISUALDL_FILE

WIDTH, MOST_LINES = 100, 24
_MOST_SOURCES = 4


def start_screen(config: TrainConfig, report: StartReport, *, first_step: int = 0) -> str:
    """At most 24 lines of 100 columns, but for names of the user's that are longer.

    Args:
        first_step: steps made already.
    """
    run = run_words(report.run, config.run_dir)
    plan = plan_words(report.plan)
    words = {
        "recipe": f"{run['recipe']} in {config.run_dir}",
        "model": f"{run['model']}, {run['precision']}",
        "plan": plan["plan"],
        "tokens": plan["tokens"],
        **_source_words(report),
        "trains": _trained_words(report),
        "steps": _step_words(config, report.plan, first_step),
        "memory": memory_words(report.memory)["memory"],
        "validation": _validation_words(config, report.plan),
        "checkpoints": _checkpoint_words(config),
        "log": ", ".join([METRICS, CURVE, *config_logs(config)]),
        "settings": f"{CONFIG_FILE}; what is learned, token by token: {PAGE}",
        "Ctrl-C": "finishes the step, saves and ends; the same command with resume=auto goes on",
    }
    width = max(map(len, words)) + 2
    lines: list[str] = []
    for name, text in words.items():
        lines += textwrap.wrap(
            text,
            WIDTH,
            initial_indent=f"{name:<{width}}",
            subsequent_indent=" " * width,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def config_logs(config: TrainConfig) -> list[str]:
    """The services that a run's numbers go to, in words."""
    words = {"wandb": f"wandb/ ({config.wandb.mode})", "visualdl": VISUALDL_FILE.partition("/")[0] + "/"}
    return [words[name] for name in config.log]


def _source_words(report: StartReport) -> dict[str, str]:
    """What the sources of a mixture give; of one alone the plan says it."""
    if len(report.sources) < 2:
        return {}
    total = sum(source.tokens * source.repeat for source in report.sources) or 1
    shown = [
        f"{short_name(source.name)}: {source.kept:,} rows, {source.tokens * source.repeat / total:.0%} of the tokens"
        for source in report.sources[:_MOST_SOURCES]
    ]
    rest = len(report.sources) - len(shown)
    return {"sources": "; ".join(shown) + (f"; and {rest} more" if rest else "")}


def _trained_words(report: StartReport) -> str:
    trained = sum(part.trainable for part in report.parts)
    every = trained + sum(part.frozen for part in report.parts)
    groups = [f"{group.group} {count_text(group.parameters)} (rank {group.rank})" for group in report.lora]
    parts = [f"{part.part} {count_text(part.trainable)}" for part in report.parts if part.trainable]
    what = f"LoRA on {', '.join(groups)}" if groups else ", ".join(parts)
    return f"{count_text(trained)} of {count_text(every)} parameters ({trained / max(every, 1):.2%}): {what}"


def _step_words(config: TrainConfig, plan: PlanFacts, first_step: int) -> str:
    optim = config.optim
    done = f", {first_step} of them made" if first_step else ""
    return (
        f"{plan.steps:,}{done}; learning rate {optim.lr:g}, {optim.schedule}, "
        f"warm-up {optim.warmup_ratio:.0%} of the steps"
    )


def _validation_words(config: TrainConfig, plan: PlanFacts) -> str:
    if plan.held_out is None:
        return "none: no rows are held out (data.eval_fraction=0.05 or data.eval_path=FILE)"
    asked = f", {min(plan.held_out.asked, config.eval.questions):,} questions" if config.eval.questions else ""
    every = config.eval.every
    unit = " steps" if every.isdigit() else "" if every == "epoch" else " epochs"
    when = "before and after" if every == "0" else f"before, after, and every {every}{unit}"
    patience = f"; ends after {config.eval.patience} without a new best" if config.eval.patience else ""
    return f"{when}: loss of {plan.held_out.rows:,} rows{asked}{patience}"


def _checkpoint_words(config: TrainConfig) -> str:
    when = f"every {config.save_steps:,} steps and at the end" if config.save_steps else "at the end"
    return f"{when}, in {CHECKPOINTS}/; the newest {config.keep_checkpoints} are kept"
