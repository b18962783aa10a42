"""The groups that all weights of the model fall into: which one a parameter belongs to. Needs no Paddle.

Six of them can get adapters (vl2.lora_settings); a factor belongs to the group of the weight that it adds to.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# Full matches of parameter paths; every parameter of a DeepseekVL2 matches exactly one.
_PATTERNS = {
    "attention": r"language\.model\.layers\.\d+\.self_attn\.\w+_(proj|mqa)\..+",
    "experts": r"language\.model\.layers\.\d+\.mlp\.experts\..+",
    "shared_experts": r"language\.model\.layers\.\d+\.mlp\.shared_experts\..+",
    "dense_mlp": r"language\.model\.layers\.\d+\.mlp\.\w+_proj\..+",
    "vision": r"vision\..+",
    "projector": r"projector\..+|image_newline|view_seperator",
    "embeddings": r"language\.model\.embed_tokens\..+",
    "head": r"language\.lm_head\..+",
    "norms": r"language\.model\.(layers\.\d+\.(self_attn\.)?\w+_layernorm|norm)\..+",
    "routers": r"language\.model\.layers\.\d+\.mlp\.gate\..+",
}
PARAMETER_GROUPS = tuple(_PATTERNS)
# What can be trained itself beside adapters on other groups.
WHOLE_GROUPS = ("vision", "projector", "embeddings", "head", "norms", "routers")
# In the checkpoint, but never computed with, or never to be trained.
_NEVER_TRAINED = ("vision.attn_pool.", ".e_score_correction_bias")
_EXPRESSIONS = {group: re.compile(pattern) for group, pattern in _PATTERNS.items()}


def group_of(path: str) -> str:
    """The group of a parameter, or of an adapter's factor.

    language.model.layers.0.self_attn.q_proj.weight      -> attention
    language.model.layers.1.mlp.experts.lora.gate_A      -> experts
    language.model.layers.1.mlp.gate.weight              -> routers
    image_newline                                        -> projector

    Args:
        path: in the DeepseekVL2, whether or not it is wrapped for LoRA.
    """
    (group,) = [group for group, expression in _EXPRESSIONS.items() if expression.fullmatch(path)]
    return group


def is_trainable(path: str) -> bool:
    """Whether a parameter of the model may train at all."""
    return not any(word in path for word in _NEVER_TRAINED)


def whole_parameters(paths: Iterable[str], groups: Sequence[str]) -> list[str]:
    """Those of a model's parameters that train when some groups do, in their order.

    Args:
        paths: of a model without adapters on these groups.
        groups: of `WHOLE_GROUPS`.
    """
    return [path for path in paths if is_trainable(path) and group_of(path) in groups]
