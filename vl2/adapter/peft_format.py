"""adapter_config.json of PEFT: what it says of each module, and ours in its words.

Source: PEFT 0.10 to 0.21 (`LoraConfig`, `check_target_module_exists`, `get_pattern_key`). A pattern of ours means the
same to all of them: target_modules is one regular expression, fully matched, so that no vision module of the same
suffix is hit; a key of rank_pattern has no alternative at its top and stands behind a dot.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vl2.adapter.foreign import Declaration, Names, dropout, positive, refuse
from vl2.adapter.formats import PEFT_CONFIG, read_json
from vl2.errors import UserError
from vl2.lora_settings import GROUPS, LoRASettings

PEFT_NAMES = Names(lambda module, letter: f"base_model.model.{module}.lora_{letter}.weight", transposed=True)

# Keys that do not change what a trained adapter computes.
_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("megatron_core", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "ensure_weight_tying"),
}
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern"),
    *("alpha_pattern", "init_lora_weights", "bias"),
}
# Initialisations that leave the base as it is; the others (pissa, olora, loftq, corda ...) are deltas to another base.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def official_pattern(group: str) -> str:
    """What a group means in the official model, as a full match: experts one by one."""
    return GROUPS[group] + (r"\.\d+\.(gate_proj|up_proj|down_proj)" if group == "experts" else "")


def peft_config(settings: LoRASettings, base: str) -> dict[str, Any]:
    """adapter_config.json for these settings.

    Args:
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
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": settings.rank,
        "rank_pattern": pattern(settings.rank_of, settings.rank),
        "alpha_pattern": pattern(settings.alpha_of, settings.alpha),
        "revision": None,
        "target_modules": "|".join(official_pattern(group) for group in settings.groups),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def number(value: float) -> float | int:
    """Without a decimal point where there is nothing behind it: both formats call alpha an integer."""
    return int(value) if value == int(value) else value


def read_peft_config(folder: Path) -> Declaration:
    """Read adapter_config.json.

    Raises:
        UserError: another method than plain LoRA, or a value that cannot be; names the key.
    """
    path = folder / PEFT_CONFIG
    document = read_json(path)
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
    rank = positive(path, "r", document.get("r"), int)
    alpha = positive(path, "lora_alpha", document.get("lora_alpha"), float)
    targets = matcher(path, "target_modules", document.get("target_modules"))
    excluded = matcher(path, "exclude_modules", document.get("exclude_modules") or [])
    return Declaration(
        path=path,
        targets=lambda module: targets(module) and not excluded(module),
        rank_of=_by_pattern(path, "rank_pattern", document, rank),
        alpha_of=_by_pattern(path, "alpha_pattern", document, alpha),
        rank=rank,
        alpha=alpha,
        dropout=dropout(path, document.get("lora_dropout")),
    )


def matcher(path: Path, key: str, value: Any) -> Callable[[str], bool]:
    """Whether a module is meant: a text is a full regular expression, a list holds names or their ends after a dot."""
    if isinstance(value, str):
        pattern = compiled(path, key, value)
        return lambda module: pattern.fullmatch(module) is not None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise UserError(f"{path}: {key} is {value!r}; expected a regular expression or a list of names")
    names = frozenset(value)
    # The ends of a.b.c: a.b.c, b.c, c.
    return lambda module: any(module.split(".", n)[n] in names for n in range(module.count(".") + 1))


def compiled(path: Path, key: str, text: str) -> re.Pattern[str]:
    """A regular expression of a configuration.

    Raises:
        UserError: it is none.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"{path}: {key} holds {text!r}, which is no regular expression ({error})") from error


def _by_pattern(path: Path, key: str, document: Mapping[str, Any], common: Any) -> Callable[[str], Any]:
    """The value of the first pattern that matches a module's name or an end of it after a dot, else the common one."""
    table = document.get(key) or {}
    if not isinstance(table, dict):
        raise UserError(f"{path}: {key} is {table!r}; expected a table of patterns")
    patterns = []
    for name, value in table.items():
        compiled(path, key, name)
        patterns.append((re.compile(rf"(.*\.)?({name})"), positive(path, f"{key}[{name!r}]", value, type(common))))

    @functools.cache  # some write a key for every module
    def look_up(module: str) -> Any:
        return next((value for pattern, value in patterns if pattern.fullmatch(module)), common)

    return look_up
