"""Command line -> dataclass: Hydra composes files, options and overrides; every fault is a UserError in one line.

Free-text keys (paths, prompts, names) go past Hydra's grammar, in which commas, parentheses, quotes, `=` and Chinese
punctuation mean something: they arrive as typed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from train.config import conf_files
from train.config.conf_files import ROOT, Recipe
from train.config.fields import Key, check_values, did_you_mean, list_keys, value_of
from train.config.lists import settle
from vl2.errors import UserError

Schema = TypeVar("Schema")


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """The arguments of a verb, taken apart."""

    conf: str | None = None
    overrides: tuple[str, ...] = ()  # for Hydra
    options: dict[str, str] = field(default_factory=dict)  # group -> NAME of `group=NAME`
    texts: dict[str, str | list[str] | None] = field(default_factory=dict)  # key -> as typed

    def names(self, name: str) -> bool:
        """Whether the user gave this key or group."""
        return name in {*self.texts, *self.options, *(_key_of(override) for override in self.overrides)}

    def names_under(self, place: str) -> bool:
        """Whether the user gave this entry of a table, or one of its keys."""
        return any(f"{_key_of(override)}.".startswith(f"{place}.") for override in self.overrides)


def _key_of(argument: str) -> str:
    return argument.partition("=")[0].strip().lstrip("+~")


def read_command_line(argv: Sequence[str], schema: type) -> CommandLine:
    """Splits `key=value` arguments by what the schema says of each key.

    Raises:
        UserError: an argument without `=`, an unknown key (with a suggestion), a key given twice.
    """
    specs = {spec.name: spec for spec in list_keys(schema)}
    known_groups = {
        group: options
        for group, options in conf_files.groups().items()
        if any(n.startswith(f"{group}.") for n in specs)
    }
    conf: str | None = None
    overrides: list[str] = []
    options: dict[str, str] = {}
    texts: dict[str, str | list[str] | None] = {}
    seen: set[str] = set()
    for argument in argv:
        before, equals, value = argument.partition("=")
        name, sign = _key_of(argument), before.strip()[: len(before.strip()) - len(_key_of(argument))]
        if (not equals and sign != "~") or name.startswith("-"):
            raise UserError(f"{argument!r}: expected key=value (`bash launch.sh help` lists verbs and keys)")
        spec = _spec_of(name, specs)
        if name in seen and not (spec and spec.is_list and spec.is_free_text):
            raise UserError(f"{name} is given twice")
        seen.add(name)
        if name == "conf":
            conf = value
        elif sign == "~" and spec and not spec.is_table:
            raise UserError(
                f"{argument}: ~ takes an option or a table's entry away, and {name} is a key: give {name}=..."
            )
        elif spec and spec.is_text_table and name != spec.name and sign != "~":
            texts[name] = value
        elif sign == "~" or (spec and spec.is_table):
            overrides.append(argument if sign else f"++{argument}")
        elif spec is None and name in known_groups:
            options[name] = _option(name, value, known_groups[name])
        elif spec is None:
            example = next(full for full in specs if full.startswith(f"{name}."))
            raise UserError(f"{argument}: {name} is a group of keys; set one of them, like {example}=...")
        elif sign == "+":  # Hydra's own words, for texts too
            raise UserError(
                f"{argument}: + adds what is not there, and {name} is: give {name}={value} or ++{name}={value}"
            )
        elif spec.is_free_text and spec.is_list:
            texts[name] = [*(texts.get(name) or []), *(_several(value) if spec.one_or_more else [value])]
        elif spec.is_free_text:
            texts[name] = None if spec.optional and value in ("", "null") else value
        else:
            overrides.append(argument)
    return CommandLine(conf=conf, overrides=tuple(overrides), options=options, texts=texts)


def _several(value: str) -> list[str]:
    """The texts that one argument of a `one_or_more` key gives.

    a, b.jsonl -> [a, b.jsonl] as one text      [a.jsonl, b.jsonl] -> two      null -> none

    No text at all stays one, which is refused: a shell's variable that is not set would train on other data.
    """
    if value == "null":
        return []
    if value.startswith("[") and value.endswith("]"):
        return [text.strip() for text in value[1:-1].split(",") if text.strip()]
    return [value]


def _spec_of(name: str, specs: dict[str, Key]) -> Key | None:
    """The leaf that a typed name means; None for `conf` and for a group of keys."""
    inner = {leaf.rpartition(".")[0] for leaf in specs} - {""}
    above = name.rpartition(".")[0]
    table, of_entries = specs.get(above), specs.get(above.rpartition(".")[0])  # lora.ranks, optim.groups
    if name in specs or (table and table.is_table):
        return specs.get(name) or table
    if of_entries and of_entries.is_table and of_entries.entry_class:
        return of_entries
    if name == "conf" or name in inner:
        return None
    raise UserError(f"unknown key {name!r}{did_you_mean(name, [*specs, *inner, 'conf'])}")


def _option(group: str, value: str, known: dict[str, str]) -> str:
    if value in known:
        return value
    instead = "a folder of weights is model.path=FOLDER" if group == "model" else f"one key of it is {group}.KEY=VALUE"
    raise UserError(f"{group}={value}: expected one of {', '.join(known)}{did_you_mean(value, known)} ({instead})")


def compose(
    line: CommandLine, schema: type[Schema], *, recipe: Recipe | None = None, overlay: str | None = None
) -> Schema:
    """Composes schema < recipe < overlay < command line and returns plain dataclasses, ranges checked.

    Args:
        recipe: None for verbs without recipes.
        overlay: Name of a file in conf/ that is laid over the recipe.

    Raises:
        UserError: unknown key, wrong type, value out of range; names the key.
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
    OmegaConf.register_new_resolver("root", lambda inside: str(ROOT / inside), replace=True)
    store = ConfigStore.instance()
    store.store(name="schema", node=schema)
    layers: list[Any] = ["schema"]
    if recipe and recipe.file:
        store.store(name="recipe_file", node=recipe.content)
    layers += ["recipe_file" if recipe.file else recipe.name] if recipe else []
    layers += [overlay] if overlay else []
    overrides = list(line.overrides)
    try:
        with initialize_config_dir(config_dir=str(conf_files.CONF), version_base="1.3"):
            if line.options:
                # An option that is typed takes the place of the recipe's, and goes before what a file adds to that.
                store.store(name="files", node={"defaults": [*layers, "_self_"]})
                chosen = hydra_compose("files", return_hydra_config=True).hydra.runtime.choices
                overrides += [f"{group}={option}" for group, option in line.options.items() if group in chosen]
                store.store(name="typed", node={"defaults": [{group: name} for group, name in line.options.items()]})
                store.store(name="options", node=hydra_compose("typed"))
                layers.append("options")
            store.store(name="run", node={"defaults": [*layers, "_self_"]})
            composed = hydra_compose("run", overrides=overrides)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, YAMLError) as problem:
        raise UserError(_in_one_line(problem, line, schema, recipe)) from problem
    assert isinstance(config, schema), f"composed to a {type(config)}: a recipe replaced the schema"
    for name, text in line.texts.items():  # after to_object: OmegaConf would read ${...} in a text
        group, _, leaf = name.rpartition(".")
        owner = value_of(config, group) if group else config
        if isinstance(owner, dict):
            owner[leaf] = text
        else:
            setattr(owner, leaf, text)
    settle(config)
    check_values(config)
    return config


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML, keys in the order of the schema."""
    import yaml

    return yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)


def _in_one_line(problem: Exception, line: CommandLine, schema: type, recipe: Recipe | None) -> str:
    """Hydra's, OmegaConf's or YAML's reason, with the file or argument, and the type that its key takes."""
    specs = {spec.name: spec for spec in list_keys(schema)}
    in_file = re.match(r"In '([^']*)': (?:\w+ raised while composing config:\n)?", str(problem))
    text = str(problem)[in_file.end() :] if in_file else str(problem.__cause__ or problem)
    reason = text.strip().partition("\n")[0]
    if mark := getattr(problem, "problem_mark", None):  # YAML
        return f"{mark.name}, line {mark.line + 1}: {' '.join(str(problem).split())}"
    named = re.search(r"full_key: (\S+)", text)
    told = f"{problem} {getattr(problem, 'override', '')}"  # an OverrideParseException keeps the argument there
    typed = next(
        (o for o in line.overrides if (named and named[1] == _key_of(o)) or o in told or f"'{_key_of(o)}'" in told), ""
    )
    key = named[1] if named else _key_of(typed)
    where = ""
    if in_file and not typed:
        where = f"{recipe.file if recipe and recipe.file else f'conf/{in_file[1]}.yaml'}: "
    spec = specs.get(key) or specs.get(key.rpartition(".")[0])
    if key and not spec and not any(name.startswith(f"{key}.") for name in specs):
        return f"{where}unknown key {key!r}{did_you_mean(key, specs)}"
    expected = f"expected {spec.expected}; " if spec and not typed.startswith("~") else ""
    said = typed.removeprefix("++") or key
    return f"{where}{said}{': ' if said else ''}{expected}{reason}"
