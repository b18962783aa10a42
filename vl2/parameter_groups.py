"""The groups that all weights of the model fall into: which one a parameter belongs to. Needs no Paddle.

Six of them can get adapters (vl2.lora_settings); a factor belongs to the group of the weight that it adds to.
"""

from __future__ import annotations

import re

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
