"""What lies in conf/: recipes, and groups with their options; and recipe files from anywhere, as a run's own."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.config.earlier import in_todays_words
from train.config.fields import did_you_mean
from vl2.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
OVERLAY = "rehearsal"  # conf/rehearsal.yaml is laid over a recipe and is none itself
# In a run's own config.yaml, but said of that one command: they hold for another only where it is typed.
_OF_ONE_COMMAND = ("recipe", "rehearsal", "command", "resume", "overwrite")


def recipes() -> dict[str, str]:
    """Recipe name -> the first comment line of conf/<name>.yaml."""
    return _described(CONF, leave_out=OVERLAY)


def groups() -> dict[str, dict[str, str]]:
    """Group -> option -> the first comment line of conf/<group>/<option>.yaml."""
    return {folder.name: _described(folder) for folder in sorted(CONF.iterdir()) if folder.is_dir()}


def _described(folder: Path, leave_out: str = "") -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        if path.stem != leave_out:
            first = path.read_text("utf-8").partition("\n")[0]
            found[path.stem] = first.removeprefix("#").strip() if first.startswith("#") else ""
    return found


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `conf=` means."""

    name: str  # of the recipe; a run's own config.yaml names the one it came from
    file: Path | None = None  # None: conf/<name>.yaml
    content: Any = field(default=None, repr=False)  # of the file
    rehearsal: bool | None = None  # of a run's own config.yaml: whether that run was a rehearsal

    def names_group(self, group: str) -> bool:
        """Whether a recipe of the user's sets optim.groups.GROUP; a run's own repeats what it took from an option."""
        if self.rehearsal is not None:
            return False
        optim = (self.content or {}).get("optim") or {}
        return group in (optim.get("groups") or {})


def open_recipe(conf: str, *, resume: bool = False) -> Recipe:
    """The recipe behind `conf=`: a name in conf/, or a YAML file, as a run's own config.yaml.

    Args:
        conf: As typed. What ends in .yaml or .yml or has a slash is a file, seen from where the command is typed.
        resume: Whether the command goes on with a run: then the run_dir in a run's own config.yaml holds too.

    Raises:
        UserError: no such recipe or file, or no mapping in it.
    """
    known = recipes()
    if conf in known:
        return Recipe(name=conf)
    if not conf.endswith((".yaml", ".yml")) and "/" not in conf:
        raise UserError(
            f"unknown recipe {conf!r}{did_you_mean(conf, known)} (in conf/: {', '.join(known)}; or conf=FILE.yaml)"
        )
    file = Path(conf).expanduser()
    if not file.is_file():
        raise UserError(f"conf={conf}: expected a recipe file, there is none{did_you_mean(file.stem, known)}")
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError, safe_load

    try:
        text = file.read_text("utf-8")
        content = safe_load(text)
        if not isinstance(content, dict):
            raise UserError(f"conf={conf}: expected keys with values, found {type(content).__name__}")
        if not isinstance(content.get("defaults", []), list):
            raise UserError(f"conf={conf}: expected a list under defaults, found {content['defaults']!r}")
        if "rehearsal" not in content:
            return Recipe(name=file.stem, file=file, content=OmegaConf.create(text))
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as problem:
        raise UserError(f"conf={conf}: {' '.join(str(problem).split())}") from problem
    one_command = _OF_ONE_COMMAND if resume else (*_OF_ONE_COMMAND, "run_dir")
    return Recipe(
        name=str(content.get("recipe") or file.stem),
        file=file,
        content={name: _literal(value) for name, value in in_todays_words(content).items() if name not in one_command},
        rehearsal=content["rehearsal"] is True,
    )


def _literal(value: Any) -> Any:
    """The value of a resolved configuration, safe from OmegaConf: `${` in a text is no interpolation."""
    if isinstance(value, dict):
        return {name: _literal(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_literal(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
