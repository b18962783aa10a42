"""Command line -> dataclass: Hydra composes recipe, overlay and overrides; every fault is a ValueError in one line.

Free-text keys (paths, prompts, names) go past Hydra's grammar, in which commas, parentheses, quotes, `=` and Chinese
punctuation mean something: they arrive as typed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from train.config.fields import Key, check_values, did_you_mean, list_keys, value_of
from vl2.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
OVERLAY = "rehearsal"  # conf/rehearsal.yaml is laid over a recipe and is none itself

Schema = TypeVar("Schema")


def recipes() -> dict[str, str]:
    """Recipe name -> the first comment line of conf/<name>.yaml."""
    found = {}
    for path in sorted(CONF.glob("*.yaml")):
        if path.stem != OVERLAY:
            first = path.read_text("utf-8").partition("\n")[0]
            found[path.stem] = first.removeprefix("#").strip() if first.startswith("#") else ""
    return found


def model_names() -> list[str]:
    """The models that `model=NAME` knows."""
    return sorted(path.stem for path in (CONF / "model").glob("*.yaml"))


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The arguments of a verb, taken apart: conf, overrides for Hydra, and free texts as typed."""

    conf: str | None
    overrides: tuple[str, ...]
    texts: dict[str, str | list[str] | None]

    def names(self, name: str) -> bool:
        """Whether the user gave this key or group."""
        given = [*self.texts, *(override.partition("=")[0].lstrip("+") for override in self.overrides)]
        return name in given


def read_command_line(argv: Sequence[str], schema: type) -> CommandLine:
    """Splits `key=value` arguments by what the schema says of each key.

    Raises:
        UserError: an argument without `=`, an unknown key (with a suggestion), a key given twice.
    """
    specs = {spec.name: spec for spec in list_keys(schema)}
    conf: str | None = None
    overrides: list[str] = []
    texts: dict[str, str | list[str] | None] = {}
    seen: set[str] = set()
    for argument in argv:
        name, equals, value = argument.partition("=")
        if not equals or name.startswith("-"):
            raise UserError(f"{argument!r}: expected key=value (`bash launch.sh help` lists verbs and keys)")
        name = name.strip().lstrip("+")
        spec = _spec_of(name, specs)
        if name in seen and not (spec and spec.is_list and spec.is_free_text):
            raise UserError(f"{name} is given twice")
        seen.add(name)
        if name == "conf":
            conf = value
        elif spec is None and name == "model":
            overrides.append(argument)
        elif spec is None:
            example = next(full for full in specs if full.startswith(f"{name}."))
            raise UserError(f"{argument}: {name} is a group of keys; set one of them, like {example}=...")
        elif spec.is_free_text and spec.is_list:
            texts[name] = [*(texts.get(name) or []), _as_path(value) if spec.path else value]
        elif spec.is_free_text:
            texts[name] = None if spec.optional and value in ("", "null") else _as_path(value) if spec.path else value
        else:
            overrides.append(f"++{name}={value}" if spec.is_table else argument)
    return CommandLine(conf=conf, overrides=tuple(overrides), texts=texts)


def _as_path(text: str) -> str:
    """Bash leaves the `~` of `key=~/x` alone."""
    return os.path.expanduser(text) if text.startswith("~") else text


def _spec_of(name: str, specs: dict[str, Key]) -> Key | None:
    """The leaf that a typed name means; None for `conf` and for a group of keys."""
    groups = {leaf.rpartition(".")[0] for leaf in specs} - {""}
    if name in specs:
        return specs[name]
    table = specs.get(name.rpartition(".")[0])
    if table and table.is_table:
        return table
    if name == "conf" or name in groups:
        return None
    raise UserError(f"unknown key {name!r}{did_you_mean(name, [*specs, *groups, 'conf'])}")


def compose(
    line: CommandLine, schema: type[Schema], *, recipe: str | None = None, overlay: str | None = None
) -> Schema:
    """Composes schema < recipe < overlay < command line and returns plain dataclasses, ranges checked.

    Args:
        recipe: Name of a file in conf/, None for verbs without recipes.
        overlay: Name of a file in conf/ that is laid over the recipe.

    Raises:
        UserError: unknown recipe, unknown key, wrong type, value out of range; names the key.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if recipe is None and line.conf is not None:
        raise UserError(f"conf={line.conf}: only training has recipes")
    if recipe is not None and recipe not in recipes():
        known = recipes()
        raise UserError(f"unknown recipe {recipe!r}{did_you_mean(recipe, known)} (in conf/: {', '.join(known)})")
    specs = {spec.name: spec for spec in list_keys(schema)}
    OmegaConf.register_new_resolver("root", lambda inside: str(ROOT / inside), replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=schema)
    layers = ["schema", *(layer for layer in (recipe, overlay) if layer), "_self_"]
    store.store(name="run", node={"defaults": layers})
    try:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            composed = hydra_compose("run", overrides=list(line.overrides))
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, YAMLError) as problem:
        raise UserError(_in_one_line(problem, line, specs)) from problem
    assert isinstance(config, schema), f"composed to a {type(config)}: a recipe replaced the schema"
    for name, text in line.texts.items():  # after to_object: OmegaConf would read ${...} in a text
        group, _, leaf = name.rpartition(".")
        setattr(value_of(config, group) if group else config, leaf, text)
    check_values(config)
    return config


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML, keys in the order of the schema."""
    import yaml

    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def _in_one_line(problem: Exception, line: CommandLine, specs: dict[str, Key]) -> str:
    """What Hydra, OmegaConf or YAML means, naming key, expected type and found value."""
    text = str(problem)
    cause = problem.__cause__ or problem
    missing_model = re.search(r"Could not find 'model/([^']*)'", text)
    if missing_model:
        name, known = missing_model[1], model_names()
        near = did_you_mean(name, known)
        return f"model={name}: expected one of {', '.join(known)}{near} (a folder of weights is model.path=FOLDER)"
    named = re.search(r"full_key: (\S+)", f"{cause}") or re.search(r"full_key: (\S+)", text)
    key = named[1] if named else next((word for word in re.findall(r"[\w.]+(?==)", text) if word in specs), "")
    key = key or str(getattr(problem, "override", None) or "").lstrip("+").partition("=")[0]
    typed = next((o.lstrip("+") for o in line.overrides if o.lstrip("+").partition("=")[0] == key), None)
    spec = specs.get(key) or specs.get(key.rpartition(".")[0])
    in_file = re.match(r"In '([^']*)': [^\n]*\n([^\n]*)", text)
    where = f"conf/{in_file[1]}.yaml: " if in_file else ""
    if spec:
        found = "" if typed else f"; {in_file[2] if in_file else _first_line(str(cause))}"
        return f"{where}{typed or key}: expected {spec.expected}{found}"
    if key and not any(name.startswith(f"{key}.") for name in specs):
        return f"{where}unknown key {key!r}{did_you_mean(key, specs)}"
    return f"{where}{typed + ': ' if typed else ''}{in_file[2] if in_file else _first_line(str(cause))}"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
