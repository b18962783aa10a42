"""The texts of `bash launch.sh help`, made from the dataclasses and from conf/."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from train.config.conf_files import groups, recipes
from train.config.fields import Key, did_you_mean, list_entry_keys, list_keys
from train.config.schema import DoctorConfig, EvaluateConfig, ExportConfig, InferConfig, RunsConfig, TrainConfig
from train.config.serve_schema import ServeConfig
from vl2.errors import UserError

SCHEMAS = {
    "train": TrainConfig,
    "dryrun": TrainConfig,
    "export": ExportConfig,
    "infer": InferConfig,
    "eval": EvaluateConfig,
    "serve": ServeConfig,
    "runs": RunsConfig,
    "doctor": DoctorConfig,
}

DRYRUN = """\
Dry run: `bash launch.sh dryrun conf=RECIPE key=value ...` takes the keys of training and trains nothing.

Reads, measures and plans as training does, lists every row that training would refuse, counts the bytes of weights,
gradients and optimizer, and writes run_dir/report.html (run_dir/dryrun.html beside a run that lies there): histograms,
sources, bad rows, and the first packs token by token. No weights are loaded or fetched. It ends with 0 when training
would start, with 2 when it would refuse."""

OVERVIEW = """\
Fine-tunes DeepSeek-VL2 on PaddlePaddle.

  bash launch.sh conf=RECIPE [key=value ...]       train; conf=FILE.yaml takes a recipe, or a run's config.yaml
  bash launch.sh conf=RECIPE resume=auto           go on from the newest whole checkpoint
  bash launch.sh dryrun conf=RECIPE [key=value ...]  what a run would train on: checked, counted, drawn; no weights
  bash launch.sh export run=FOLDER                 the merged weights of a run, or its adapter, verified
  bash launch.sh infer model=FOLDER image=FILE prompt=TEXT
  bash launch.sh eval model=FOLDER data.path=FILE  loss and scores
  bash launch.sh serve model=FOLDER                answers over HTTP, as OpenAI's API, and a page to try it on
  bash launch.sh runs [FOLDER ...] [diff=[A,B]]    the runs in outputs/: state, steps, losses; what differs between two
  bash launch.sh doctor                            is this machine fit, and its GPU right? one file for a bug report
  bash launch.sh config [VERB] key=value ...       print the resolved configuration, run nothing
  bash launch.sh test [quick|lint] [pytest arguments]  linter, types and tests (without slow ones; without any)
  bash launch.sh bench NAME [arguments]            a benchmark: step, launches, data, images, packing, soak ...
  bash launch.sh help VERB                         every key of train, dryrun, export, infer, eval, serve, runs, doctor

Recipes (conf/*.yaml):
{recipes}

Groups (conf/GROUP/*.yaml): GROUP=NAME sets several keys at once, GROUP.KEY=VALUE one of them.
{groups}

Texts and paths arrive as typed: quote them for the shell, nothing else. A relative path starts where you type it.
Other values follow Hydra's grammar: numbers, true, null, [a,b].
VENV=none uses the active Python (a Docker image with its own paddlepaddle-gpu); VENV=FOLDER another environment."""


def overview() -> str:
    """Verbs, recipes and groups."""
    known = {f"{group}=": ", ".join(options) for group, options in groups().items()}
    return OVERVIEW.format(recipes=_columns(recipes()), groups=_columns(known))


def _columns(texts: Mapping[str, str]) -> str:
    width = max(map(len, texts))
    return "\n".join(
        textwrap.fill(text, 118, initial_indent=f"  {name:{width}}  ", subsequent_indent=" " * (width + 4))
        for name, text in texts.items()
    )


def verb_help(verb: str) -> str:
    """Every key of a verb: name, default, unit, range, meaning.

    Raises:
        UserError: the verb has no keys or is unknown.
    """
    if verb not in SCHEMAS:
        raise UserError(f"no keys for {verb!r}; help takes one of {', '.join(SCHEMAS)}{did_you_mean(verb, SCHEMAS)}")
    schema = SCHEMAS[verb]
    lines = [str(schema.__doc__), ""]
    if verb == "dryrun":
        lines = [f"{DRYRUN}\n", *lines]
    if schema is TrainConfig:
        lines.append(_entry("conf", "", "Recipe: conf/NAME.yaml; or a file, NAME.yaml or a run's config.yaml."))
        for group, options in groups().items():
            said = " ".join(f"{name}: {text}" for name, text in options.items())
            lines.append(_entry(group, "", f"Sets {group}.* from conf/{group}/NAME.yaml. {said}"))
    for spec in list_keys(schema):
        for one in (spec, *list_entry_keys(spec)):
            lines.append(_entry(one.name, _plain(one.default), f"{one.doc}{_facts(one)}"))
    return "\n".join(lines)


def _entry(name: str, default: str, text: str) -> str:
    head = f"  {name} = {default}" if default else f"  {name}"
    filled = textwrap.fill(text, 118, initial_indent=f"{head:42}", subsequent_indent=" " * 42)
    return filled if len(head) < 42 else f"{head}\n{textwrap.indent(textwrap.fill(text, 76), ' ' * 42)}"


def _facts(spec: Key) -> str:
    limits = ""
    if spec.high is not None:
        limits = f"{spec.low} to {spec.high}"
    elif spec.low is not None:
        limits = f"at least {spec.low}"
    told = ", ".join(fact for fact in (spec.unit, limits, "|".join(spec.choices)) if fact)
    return f" [{told}]" if told else ""


def _plain(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    if isinstance(value, dict):
        return "{}"
    return (
        {None: "null", True: "true", False: "false", "": "''"}.get(value, str(value)) if _is_word(value) else str(value)
    )


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool) or value == ""
