"""adapter_config.json of PEFT: what it says of each module, and ours in its words.

Source: PEFT 0.10 to 0.21 (`LoraConfig`, `check_target_module_exists`, `get_pattern_key`). A pattern of ours means the
same to all of them: target_modules is one regular expression, fully matched, so that no vision module of the same
suffix is hit; a key of rank_pattern has no alternative at its top and stands behind a dot.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vl2.adapter.foreign import Declaration, Names
from vl2.adapter.formats import PEFT_CONFIG
from vl2.adapter.module_patterns import Expression, matched
from vl2.adapter.values import alpha, dropout, flag, rank, refuse, shown, table, texts
from vl2.json_object import read_json_object
from vl2.lora_settings import GROUPS, LoRASettings

Number = TypeVar("Number", int, float)

PEFT_PREFIX = "base_model.model."
PEFT_NAMES = Names(lambda module, letter: f"{PEFT_PREFIX}{module}.lora_{letter}.weight", transposed=True)

# Keys that do not change what a trained adapter computes.
_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("megatron_core", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "ensure_weight_tying"),
}
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern"),
    *("alpha_pattern", "init_lora_weights", "bias", "use_rslora", "modules_to_save"),
}
# Initialisations that leave the base as it is; the others (pissa, olora, loftq, corda ...) are deltas to another base.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def official_pattern(group: str) -> str:
    """What a group means in the official model, as a full match: experts one by one."""
    return GROUPS[group] + (r"\.\d+\.(gate_proj|up_proj|down_proj)" if group == "experts" else "")


def peft_config(settings: LoRASettings, base: str, saved_modules: Sequence[str] = ()) -> dict[str, Any]:
    """adapter_config.json for these settings.

    Args:
        saved_modules: official names of the modules that the adapter holds whole.
        settings: ranks and alphas that are not the common ones go into rank_pattern and alpha_pattern.
        base: name or folder of the base model.
    """

    def pattern(of_group: Callable[[str], float], common: float) -> dict[str, float]:
        # Without the first name: PEFT before 0.15 wants something and a dot in front of a key.
        keys = {group: official_pattern(group).partition(r"\.")[2] for group in settings.groups}
        return {key: number(of_group(group)) for group, key in keys.items() if of_group(group) != common}

    return {
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": number(settings.alpha),
        "lora_dropout": settings.dropout,
        "modules_to_save": sorted(saved_modules) or None,
        "peft_type": "LORA",
        "r": settings.rank,
        "rank_pattern": pattern(settings.rank_of, settings.rank),
        "alpha_pattern": pattern(settings.alpha_of, settings.alpha),
        "revision": None,
        "target_modules": "|".join(official_pattern(group) for group in settings.groups),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": settings.rslora,
    }


def number(value: float) -> float | int:
    """Without a decimal point where there is nothing behind it: both formats call alpha an integer."""
    return int(value) if value == int(value) else value


def read_peft_config(folder: Path, modules: Sequence[str], parameters: Sequence[str]) -> Declaration:
    """Read adapter_config.json.

    Args:
        folder: of the adapter.
        modules: official names of the base's Linears.
        parameters: paths of the parameters that an adapter may hold whole.

    Raises:
        UserError: another method than plain LoRA, or a value that cannot be; names the key.
    """
    path = folder / PEFT_CONFIG
    document = read_json_object(path)
    if document.get("peft_type") != "LORA":
        refuse(path, "peft_type", document.get("peft_type"), "expected LORA")
    if (document.get("bias") or "none") != "none":
        refuse(path, "bias", document["bias"], "expected none: an adapter that trains biases cannot be read here")
    if (start := document.get("init_lora_weights")) not in _PLAIN_STARTS:
        refuse(
            path,
            "init_lora_weights",
            start,
            "such an adapter adds to a base that was changed too; have PEFT convert it to plain LoRA when saving it",
        )
    for key, value in document.items():
        if key not in _READ and key not in _WITHOUT_EFFECT and value:
            refuse(path, key, value)
    lists = {
        "target_modules": document.get("target_modules"),
        "exclude_modules": document.get("exclude_modules") or [],
    }
    ranks = _values(path, "rank_pattern", document, rank)
    alphas = _values(path, "alpha_pattern", document, alpha)
    expressions = [Expression(key, value) for key, value in lists.items() if isinstance(value, str)]
    expressions += [
        Expression(key, name, ends=True)
        for key, values in (("rank_pattern", ranks), ("alpha_pattern", alphas))
        for name in values
        if not _is_name(name)
    ]
    meant = dict(zip(expressions, matched(path, expressions, modules)))
    targets, excluded = (
        meant[Expression(key, value)] if isinstance(value, str) else _ending(path, key, value, modules)
        for key, value in lists.items()
    )
    return Declaration(
        path=path,
        targets=targets - excluded,
        ranks=_by_pattern("rank_pattern", ranks, meant, modules),
        alphas=_by_pattern("alpha_pattern", alphas, meant, modules),
        rank=rank(path, "r", document.get("r")),
        alpha=alpha(path, "lora_alpha", document.get("lora_alpha")),
        dropout=dropout(path, "lora_dropout", document.get("lora_dropout")),
        rslora=flag(path, "use_rslora", document.get("use_rslora")),
        whole=_saved(path, document.get("modules_to_save") or [], parameters),
    )


def _saved(path: Path, value: Any, parameters: Sequence[str]) -> frozenset[str]:
    """The parameters of the modules that modules_to_save means: those whose name ends so, and all below them."""
    found: set[str] = set()
    for name in texts(path, "modules_to_save", value, "a list of modules' names"):
        below = {p for p in parameters if any(owner.endswith(name) for owner in _owners(p))} if name else set()
        if not below:
            refuse(path, "modules_to_save", [name], "no module of this model can be replaced by that name")
        found |= below
    return frozenset(found)


def _owners(parameter: str) -> list[str]:
    """The modules that a parameter lies in: of a.b.weight a.b and a."""
    parts = parameter.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _ends(module: str) -> list[str]:
    """The ends of a.b.c: a.b.c, b.c, c."""
    return [module.split(".", n)[n] for n in range(module.count(".") + 1)]


def _ending(path: Path, key: str, value: Any, modules: Sequence[str]) -> frozenset[str]:
    """The modules that a list means by their names or ends of them."""
    names = frozenset(texts(path, key, value, "a regular expression or a list of names"))
    return frozenset(module for module in modules if not names.isdisjoint(_ends(module)))


def _values(path: Path, key: str, document: Mapping[str, Any], read: Callable[..., Number]) -> dict[str, Number]:
    values = table(path, key, document.get(key) or {}, "a table of patterns")
    return {name: read(path, f"{key}[{shown(name)}]", value) for name, value in values.items()}


def _is_name(pattern: str) -> bool:
    """Whether a pattern is a module's name or an end of one: some write thousands, which need no matching.

    Its dots stand for themselves: no two modules of a model differ in nothing but a dot.
    """
    return re.fullmatch(r"\w+(\.\w+)*", pattern) is not None


def _by_pattern(
    key: str, values: Mapping[str, Number], meant: Mapping[Expression, frozenset[str]], modules: Sequence[str]
) -> dict[str, Number]:
    """The value of the first pattern that matches a module's name or an end of it after a dot, where one does."""
    place = {name: number for number, name in enumerate(values)}
    expressions = [(name, meant[Expression(key, name, ends=True)]) for name in values if not _is_name(name)]
    found = {}
    for module in modules:
        hits = [end for end in _ends(module) if end in values and _is_name(end)]
        hits += [name for name, matches in expressions if module in matches]
        if hits:
            found[module] = values[min(hits, key=place.__getitem__)]
    return found
