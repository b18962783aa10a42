"""Arguments of a verb -> its checked configuration; what no single key tells is checked here."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from train.config import compose
from train.config.conf_files import OVERLAY, Recipe, groups, open_recipe, recipes
from train.config.data_schema import SOURCE_DOC, DataConfig
from train.config.schema import METRICS, NANO, DoctorConfig, EvaluateConfig, ExportConfig, InferConfig, TrainConfig
from train.config.serve_schema import ServeConfig
from train.config.trains import check_groups, check_trains
from train.config.validation import check_validation
from train.machine.devices import Machine, choose_device, find_machine
from vl2.errors import UserError

_T = TypeVar("_T")
_SECONDS_PER_PACK = 1.05  # of nano on 2 cores: 157 s for the 150 packs of a rehearsal, with its questions


def load_config(argv: Sequence[str], machine: Machine | None = None) -> TrainConfig:
    """The configuration of a training run: recipe < rehearsal overlay < command line.

    Args:
        argv: `key=value` arguments, `conf=RECIPE` or `conf=FILE.yaml` among them.
        machine: What the probes saw; None: look.

    Raises:
        UserError: an unknown recipe or key, a wrong type, a value out of range, a GPU that Paddle cannot use.
    """
    line = compose.read_command_line(argv, TrainConfig)
    if line.conf is None:
        raise UserError(f"no recipe: give conf=NAME, one of {', '.join(recipes())}, or conf=FILE.yaml")
    for name, instead in (("recipe", "; give conf=NAME"), ("rehearsal", "; give rehearse=true"), ("command", "")):
        if line.names(name):
            raise UserError(f"{name} is set by the door{instead}")
    machine = machine or find_machine()
    recipe = open_recipe(line.conf, resume=line.names("resume"))
    config = compose.compose(line, TrainConfig, recipe=recipe)
    device = choose_device(config.device, machine)
    rehearsal = is_rehearsal(config, line, machine, recipe)
    if rehearsal and not recipe.rehearsal:
        config = compose.compose(line, TrainConfig, recipe=recipe, overlay=OVERLAY)
    config.recipe, config.rehearsal = recipe.name, rehearsal
    config.command = shlex.join(["bash", "launch.sh", *argv])
    if line.names("epochs") and not line.names("max_steps"):  # what is typed goes before what a file says
        config.max_steps = None
    if line.names("max_steps") and not line.names("epochs"):
        config.epochs = None
    if line.names("data.path") and config.data.path and not line.names("data.sources"):
        config.data.sources = []
    if line.names("data.sources") and config.data.sources and not line.names("data.path"):
        config.data.path = []
    config.nproc = config.nproc or (machine.usable_gpus if device == "gpu" else 1)
    config.run_dir = config.run_dir or str(Path("outputs", "rehearsal" if rehearsal else "", recipe.name))
    _check_run(config, machine, device)
    check_groups(config, lambda group: line.names_under(f"optim.groups.{group}") or recipe.names_group(group))
    return config


def is_rehearsal(config: TrainConfig, line: compose.CommandLine, machine: Machine, recipe: Recipe) -> bool:
    """Whether the run is a rehearsal: by hand, or as there is no accelerator and nobody asked for the real thing.

    A run's own config.yaml repeats that run: a rehearsal, whose settings are nano's, stays one; a real run is real.

    Raises:
        UserError: rehearse=false with the configuration of a rehearsal.
    """
    named = line.names("model") or line.names("model.path")
    if recipe.rehearsal and not named:
        if line.names("rehearse") and config.rehearse is False:
            raise UserError(
                f"conf={line.conf}: the settings of a rehearsal, for nano; the real run is conf={recipe.name}"
            )
        return True
    if config.rehearse is not None and (recipe.rehearsal is None or line.names("rehearse")):
        return config.rehearse
    asked_for = named or line.names("device") or config.nnodes > 1 or recipe.rehearsal is not None
    return not machine.gpus and not asked_for and Path(config.model.path) != NANO


def _check_data(data: DataConfig) -> None:
    """What no single key of the data tells."""
    if data.path and data.sources:
        raise UserError("data.path and data.sources are both given; write data.path's files as entries of data.sources")
    names: dict[str, str] = {}  # name of a source -> the key that gives it
    for i, source in enumerate(data.sources):
        _require(source.path, f"data.sources[{i}].path: expected {SOURCE_DOC}, found nothing")
        place, name = f"data.sources[{i}].name", source.name or source.path
        if name in names:
            raise UserError(f"{place}: {names[name]} is called {name} too; give each a name of its own")
        names[name] = place
    for key, paths in (("path", data.path), ("eval_path", data.eval_path)):
        if twice := [path for i, path in enumerate(paths) if path in paths[:i]]:
            raise UserError(f"data.{key} names {twice[0]} twice; to repeat rows, give repeat in data.sources")
    for key, value in (("eval_fraction", data.eval_fraction), ("eval_rows", data.eval_rows)):
        if value is not None and data.eval_path:
            raise UserError(
                f"data.{key}={value} with data.eval_path: the rows of data.eval_path are held out already; give one"
            )


def _check_run(config: TrainConfig, machine: Machine, device: str) -> None:
    """What no single key tells."""
    _check_data(config.data)
    _check_metrics(config.eval.metrics, "eval.metrics")
    check_validation(config)
    if config.epochs is None and config.max_steps is None:
        raise UserError("epochs and max_steps are both null: one of them must say how long the run is")
    check_trains(config)
    if device == "gpu" and config.nproc > machine.usable_gpus:
        raise UserError(f"nproc={config.nproc}: this machine has {machine.usable_gpus} usable GPUs")
    if config.nnodes > 1 and not config.master:
        raise UserError(f"nnodes={config.nnodes}: give master=IP:PORT of machine 0, and rank= on each machine")
    if config.rank >= config.nnodes:
        raise UserError(
            f"rank={config.rank}: the machines are numbered 0 to {config.nnodes - 1} (nnodes={config.nnodes})"
        )
    check_divides(config.packs_per_step, config.nproc * config.nnodes)
    _check_sharding(config)


def _check_sharding(config: TrainConfig) -> None:
    stage, degree, ranks = config.sharding.stage, config.sharding.degree, config.nproc * config.nnodes
    if degree and not stage:
        raise UserError(f"sharding.degree={degree} with sharding.stage=0: nothing is shared; give sharding.stage too")
    if stage and ranks == 1:
        raise UserError(
            f"sharding.stage={stage} with one process: there is no other one to share with; give nproc= or nnodes=, "
            "or sharding.stage=0"
        )
    if stage and (degree == 1 or (degree and ranks % degree)):
        divisors = ", ".join(str(n) for n in range(2, ranks + 1) if ranks % n == 0)
        raise UserError(
            f"sharding.degree={degree}: expected a divisor of the {ranks} processes ({divisors}), or 0: all"
        )
    if stage >= 2:
        _check_shared_layers(config, ranks)


def _check_shared_layers(config: TrainConfig, ranks: int) -> None:
    """What the stages that divide the decoder layers do not go together with."""
    stage = f"sharding.stage={config.sharding.stage}"
    if config.sharding.degree not in (0, ranks):
        raise UserError(
            f"sharding.degree={config.sharding.degree} with {stage}: it divides layers among all {ranks} processes; "
            "leave sharding.degree out, or give sharding.stage=1"
        )
    if config.recompute != 1:
        raise UserError(
            f"recompute={config.recompute} with {stage}: every layer is computed once more in backward, when its "
            "weights and gradients are exchanged; leave recompute=1"
        )
    if config.precision == "fp16":
        raise UserError(f"precision=fp16 with {stage}: its loss scaler looks at whole gradients; give precision=bf16")
    if config.sharding.stage == 3 and config.lora.rank:
        raise UserError(
            f"lora.rank={config.lora.rank} with {stage}: it divides weights that train, and adapters are small; give "
            "sharding.stage=1 or 2, or lora.rank=0 to train all weights"
        )
    if config.sharding.stage == 3 and config.eval.questions:
        raise UserError(
            f"eval.questions={config.eval.questions} with {stage}: no process has all weights to answer with; give "
            "eval.questions=0, the held-out loss is computed all the same, and ask the checkpoints with `eval`"
        )


def check_divides(packs_per_step: int, num_ranks: int) -> None:
    """Refuses a number of ranks that does not divide the packs of a step.

    Raises:
        UserError: with the nearest numbers that work.
    """
    if packs_per_step % num_ranks:
        up = packs_per_step + -packs_per_step % num_ranks
        below = max(n for n in range(1, num_ranks) if packs_per_step % n == 0)
        raise UserError(
            f"packs_per_step={packs_per_step} cannot be shared by {num_ranks} processes: "
            f"give packs_per_step={up}, or nproc= so that there are {below} processes"
        )


def _length(config: TrainConfig) -> str:
    """How long a rehearsal is: its steps, and the time they take on two cores, a machine without an accelerator."""
    if config.max_steps is None:
        return f"for {config.epochs:g} epochs"
    minutes = max(1, round(config.max_steps * config.packs_per_step * _SECONDS_PER_PACK / 60))
    return f"for {config.max_steps} steps: about {minutes} min on 2 idle cores, longer beside other work"


def rehearsal_notice(config: TrainConfig, arguments: Sequence[str]) -> str:
    """What a rehearsal says first and last: what it is, and the command that does the real thing.

    Args:
        arguments: What the user typed.
    """
    kept = [argument for argument in arguments if not argument.startswith("rehearse=")]
    if config.recipe in recipes():  # also where conf= is the config.yaml of a rehearsal
        kept = [f"conf={config.recipe}" if argument.startswith("conf=") else argument for argument in kept]
    lines = [
        f"REHEARSAL ({'no accelerator here' if config.rehearse is None else 'rehearse=true'}): "
        f"the recipe's data, code and files on the nano model, {_length(config)}.",
        f"  The real run, on a machine with a GPU: bash launch.sh {shlex.join(kept)}",
        f"  The real run here all the same:        bash launch.sh {shlex.join([*kept, 'rehearse=false'])}",
    ]
    if config.data.path or config.data.sources:
        lines.append("  Exact: image tokens and tiles. Not: text tokens and so packs, counted with nano's tokenizer.")
    return "\n".join(lines)


def load_export_config(argv: Sequence[str]) -> ExportConfig:
    """The configuration of `export`."""
    config = compose.compose(compose.read_command_line(argv, ExportConfig), ExportConfig)
    wanted = "export needs run=FOLDER, a run's folder or one of its checkpoints, or model=FOLDER to convert a model"
    _require(config.run or config.model, wanted)
    if config.run and config.model:
        raise UserError("export takes run= or model=, not both")
    if config.model:
        _require(config.out, f"export model={config.model} needs out=FOLDER, where to write it")
        config.model = model_folder(config.model)
        if config.adapter or config.base or config.checkpoint:
            raise UserError(
                f"export model={config.model}: adapter=, base= and checkpoint= are for what was trained; give run= "
                "instead"
            )
    if not config.checkpoint:  # else it is asked which that is, first
        config.out = config.out or default_export(config.run, config.adapter)
    config.base = config.base and model_folder(config.base)
    return config


def default_export(run: str, adapter: str) -> str:
    """Where an export goes when nobody says: into the run's folder, never into a checkpoint, which pruning deletes.

    run=outputs/mine                            -> outputs/mine/export
    run=outputs/mine/checkpoints/step-000200    -> outputs/mine/export-step-000200

    Args:
        run: folder of a run, a checkpoint or an adapter.
        adapter: format of an exported adapter; empty: merged weights.
    """
    name, place = f"adapter_{adapter}" if adapter else "export", Path(run).absolute()
    for folder in (place, *place.parents):
        if folder.parent.name == "checkpoints" and folder.name.startswith("step-"):
            found = folder.parent.parent / f"{name}-{folder.name}"
            return str(found) if Path(run).is_absolute() else os.path.relpath(found)
    return str(Path(run, name))


def load_infer_config(argv: Sequence[str]) -> InferConfig:
    """The configuration of `infer`."""
    config = compose.compose(compose.read_command_line(argv, InferConfig), InferConfig)
    config.model = model_folder(_require(config.model, "infer needs model=FOLDER, a base model, a run or an export"))
    config.base = config.base and model_folder(config.base)
    _require(config.prompt or config.messages, "infer needs prompt=TEXT, or messages=FILE for a whole conversation")
    if config.prompt and config.messages:
        raise UserError("infer takes prompt= or messages=, not both")
    if 0 < config.temperature < 0.001:
        raise UserError(f"temperature={config.temperature}: expected 0, which is greedy, or at least 0.001")
    return config


def load_doctor_config(argv: Sequence[str]) -> DoctorConfig:
    """The configuration of `doctor`."""
    return compose.compose(compose.read_command_line(argv, DoctorConfig), DoctorConfig)


def load_eval_config(argv: Sequence[str]) -> EvaluateConfig:
    """The configuration of `eval`."""
    config = compose.compose(compose.read_command_line(argv, EvaluateConfig), EvaluateConfig)
    config.model = model_folder(_require(config.model, "eval needs model=FOLDER, a base model, a run or an export"))
    config.base = config.base and model_folder(config.base)
    if not config.data.path:
        raise UserError("eval needs data.path=FILE, rows with questions and the answers expected")
    _check_metrics(config.metrics, "metrics")
    config.against = config.against and model_folder(config.against)
    config.against_base = config.against_base and model_folder(config.against_base)
    for name in ("against_base", "against_checkpoint"):
        if (value := getattr(config, name)) and not config.against:
            raise UserError(f"{name}={value}: expected against=FOLDER too, found none")
    if config.report and not config.report.lower().endswith(".html"):
        raise UserError(f"report={config.report}: expected the name of a .html file")
    if config.report and Path(config.report).resolve() == Path(config.out).resolve():
        raise UserError(f"report={config.report}: the same file as out=; give another")
    return config


def _check_metrics(metrics: list[str], key: str) -> None:
    _require(metrics, f"{key}=[]: expected at least one of {', '.join(METRICS)}")


def load_serve_config(argv: Sequence[str]) -> ServeConfig:
    """The configuration of `serve`."""
    config = compose.compose(compose.read_command_line(argv, ServeConfig), ServeConfig)
    config.model = model_folder(_require(config.model, "serve needs model=FOLDER, a base model, a run or an export"))
    config.base = config.base and model_folder(config.base)
    if config.api_key and config.api_key_file:
        raise UserError("serve takes api_key= or api_key_file=, not both")
    return config


def model_folder(model: str) -> str:
    """The path behind `model=`: a folder as typed, or the path of one of conf/model's names."""
    if not Path(model).exists() and model in groups()["model"]:
        return compose.compose(compose.CommandLine(options={"model": model}), TrainConfig).model.path
    return model


def _require(value: _T, message: str) -> _T:
    if not value:
        raise UserError(message)
    return value
